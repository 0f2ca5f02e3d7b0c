"""A stand-in for a phone: it speaks adb's protocol to the real adb client, over TCP.

`shell` (version 2) runs commands on this machine, in a folder of its own, with `run-as`, `am` and
`pidof` in place of Android's; the app that takes jobs is this project's job_runner. Protocol:
packages/modules/adb, docs/dev/protocol.md and shell_protocol.h in Android's sources.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (
    int.from_bytes(word, "little")
    for word in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE")
)
AUTH_SIGNATURE = 2
VERSION, MAX_DATA = 0x01000001, 256 * 1024
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
BANNER = b"device::ro.product.name=standin;ro.product.model=Stand_in;features=shell_v2,cmd"
APP = "org.pocketdiffusion.sample"

_RUN_AS = f"""#!/bin/sh
[ "$1" = {APP} ] || {{ echo "run-as: unknown package: $1" >&2; exit 1; }}
shift; cd "$PHONE/data" && exec "$@"
"""
# What the app is told, as `am` passes it on: --es KEY VALUE.
_AM = """#!/bin/sh
verb=$1; shift
if [ "$verb" = force-stop ]; then kill -9 "$(cat "$PHONE/pid")" 2>/dev/null; exit 0; fi
[ -e "$PHONE/no_activity" ] && {{ echo "Error: Activity class does not exist."; exit 0; }}
kill -9 "$(cat "$PHONE/pid" 2>/dev/null)" 2>/dev/null
while [ $# -gt 0 ]; do
  case "$1" in --es) case "$2" in job) job=$3;; only) only=$3;; esac; shift 3;; *) shift;; esac
done
cd "$PHONE/data/files/pocket_diffusion" || exit 1
setsid sh "$PHONE/app" "$job" "$only" >"$PHONE/log" 2>&1 </dev/null &
echo $! >"$PHONE/pid"
echo "Status: ok"
"""
_APP = """#!/bin/sh
bundle=$({python} -c 'import json,sys; print(json.load(open(sys.argv[1]))["manifest_sha256"])' \\
  jobs/$1/job.json)
exec {python} -m mobile_runtime.job_runner jobs/$1 bundles/$bundle --output results/$1 \\
  --only $(echo "$2" | tr , ' ')
"""
_PIDOF = """#!/bin/sh
kill -0 "$(cat "$PHONE/pid" 2>/dev/null)" 2>/dev/null && cat "$PHONE/pid"
"""


class Phone:
    """One phone on a port of its own. folder: its files, and switches for what goes wrong."""

    def __init__(self, folder: Path, authorized: bool = True) -> None:
        self.folder, self.authorized, self.gone = folder, authorized, False
        self.commands: list[str] = []
        (folder / "data").mkdir(parents=True)
        (folder / "bin").mkdir()
        scripts = {"run-as": _RUN_AS, "am": _AM, "pidof": _PIDOF}
        for name, text in scripts.items():
            (folder / "bin" / name).write_text(text.replace("{{", "{").replace("}}", "}"))
            (folder / "bin" / name).chmod(0o755)
        self.set_app(_APP.format(python=sys.executable))
        self._listener = socket.create_server(("127.0.0.1", 0))
        # As adb names it once it is connected.
        self.serial = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def set_app(self, script: str) -> None:
        """What runs as the app: a shell script, given the job's id and the tasks."""
        (self.folder / "app").write_text(script)

    def script(self, name: str, text: str) -> None:
        """A command of the phone, instead of this machine's."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def unplug(self) -> None:
        """The phone is gone, in the middle of whatever it did."""
        self.gone = True
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def plug_in(self) -> None:
        """The same phone again, under the same name."""
        host, port = self.serial.split(":")
        self._listener, self.gone = socket.create_server((host, int(port))), False
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """End it, and the app."""
        self.unplug()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.folder / "pid").read_text()), 9)

    def _serve(self) -> None:
        while not self.gone:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        streams: dict[int, _Stream] = {}
        sending = threading.Lock()

        def send(command: int, arg0: int, arg1: int, data: bytes = b"") -> None:
            header = struct.pack(
                "<6I", command, arg0, arg1, len(data), sum(data) & 0xFFFFFFFF, command ^ 0xFFFFFFFF
            )
            with sending, contextlib.suppress(OSError):
                connection.sendall(header + data)

        try:
            while True:
                command, arg0, _, length, _, _ = struct.unpack("<6I", _exactly(connection, 24))
                data = _exactly(connection, length)
                if command == CNXN:
                    if self.authorized:
                        send(CNXN, VERSION, MAX_DATA, BANNER)
                    else:
                        send(AUTH, 1, 0, bytes(20))
                elif command == AUTH and arg0 == AUTH_SIGNATURE:
                    send(AUTH, 1, 0, bytes(20))  # not a key that it knows; nobody taps on "allow"
                elif command == OPEN:
                    service = data.rstrip(b"\0").decode()
                    if not service.startswith("shell,v2"):
                        send(CLSE, 0, arg0)
                        continue
                    text = service.partition(":")[2]
                    self.commands.append(text)
                    streams[arg0] = _Stream(self, text, arg0, send)
                elif command == WRTE:
                    send(OKAY, arg0, arg0)
                    if arg0 in streams:
                        streams[arg0].given(data)
                elif command == OKAY and arg0 in streams:
                    streams[arg0].may_send.set()
                elif command == CLSE and arg0 in streams:
                    streams.pop(arg0).stop()
        except (OSError, EOFError):
            for stream in streams.values():
                stream.stop()


class _Stream:
    """One shell command: its input and output in packets of the shell protocol."""

    def __init__(self, phone: Phone, command: str, number: int, send: "object") -> None:
        self.number, self.send = number, send
        self.may_send = threading.Event()
        self.waiting = b""
        path = f"{phone.folder / 'bin'}:{os.environ['PATH']}"
        code = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PATH": path, "PHONE": str(phone.folder), "PYTHONPATH": str(code)},
        )
        send(OKAY, number, number)  # type: ignore[operator]
        self.may_send.set()
        threading.Thread(target=self._answer, daemon=True).start()

    def given(self, data: bytes) -> None:
        """Input, cut anywhere."""
        self.waiting += data
        while len(self.waiting) >= 5:
            kind, length = struct.unpack("<BI", self.waiting[:5])
            if len(self.waiting) < 5 + length:
                return
            content, self.waiting = self.waiting[5 : 5 + length], self.waiting[5 + length :]
            assert self.process.stdin is not None
            with contextlib.suppress(OSError, ValueError):
                if kind == STDIN:
                    self.process.stdin.write(content)
                    self.process.stdin.flush()
                elif kind == CLOSE_STDIN:
                    self.process.stdin.close()

    def stop(self) -> None:
        """The other side has hung up."""
        self.may_send.set()
        self.process.kill()

    def _answer(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        lock = threading.Lock()

        def forward(kind: int, stream: "object") -> None:
            while chunk := stream.read1(32 * 1024):  # type: ignore[attr-defined]
                with lock:
                    self._packet(kind, chunk)

        errors = threading.Thread(target=forward, args=(STDERR, self.process.stderr), daemon=True)
        errors.start()
        forward(STDOUT, self.process.stdout)
        errors.join()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._packet(EXIT, bytes([code & 0xFF]))
        self.send(CLSE, self.number, self.number)  # type: ignore[operator]

    def _packet(self, kind: int, content: bytes) -> None:
        self.may_send.wait(30)
        self.may_send.clear()
        data = struct.pack("<BI", kind, len(content)) + content
        self.send(WRTE, self.number, self.number, data)  # type: ignore[operator]


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data
