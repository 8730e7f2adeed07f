"""`unshare -rn python -m benchmarks.offline COMMAND...`: run a command where there is no network but the loopback, which is
down in a namespace that is new. Elsewhere it refuses.
"""

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1


def offline(command: list[str]) -> list[str]:
    """What runs a command without a network, by whoever may make namespaces."""
    return ["unshare", "--map-root-user", "--net", sys.executable, "-m", "benchmarks.offline", *command]


if __name__ == "__main__":
    ways = [line.split()[0] for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    if ways:
        sys.exit(f"benchmarks.offline: there is a way out by {', '.join(sorted(set(ways)))}: run it by unshare -rn")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
    os.execvp(sys.argv[1], sys.argv[1:])
