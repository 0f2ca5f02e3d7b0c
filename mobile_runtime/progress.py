"""A line on stderr for work that cannot tell how far it is: what runs, and for how long."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

AFTER_S = 2.0
"""Nothing flashes by that is done before."""
TICK_S = 1.0


@contextmanager
def told(text: str = "") -> Iterator[Callable[[str], None]]:
    """Show a text and the time that passes, where stderr is a terminal; yields what changes it."""
    # disable=None: nothing where the output is not a terminal.
    with tqdm(
        bar_format="{desc} {elapsed}",
        disable=None,
        delay=AFTER_S,
        leave=False,
        mininterval=0,
        miniters=1,
    ) as line:
        done = threading.Event()

        def tell(text: str) -> None:
            line.set_description_str(text, refresh=False)
            line.update()

        def tick() -> None:
            while not done.wait(TICK_S):
                line.update()

        tell(text)
        if line.disable:
            yield tell
            return
        thread = threading.Thread(target=tick)
        thread.start()
        try:
            yield tell
        finally:
            done.set()
            thread.join()
