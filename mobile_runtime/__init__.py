"""From files to pictures, and the proof: runs a bundle and validates what it computes.

Importing this package needs neither torch nor diffusers; a backend imports its library when used.
"""

__version__ = "0.1.0"
