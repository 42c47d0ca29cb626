"""Download one file from the user's package index, found as pip would find it, and run nothing of it.

`pip download` of a source distribution executes the package's build script to learn its metadata. This script stops
before that: it asks pip's own index client (index-url, find-links, proxies, certificates, credentials and cache as
the user configured them) where the file is, and streams it to disk. An interrupted download continues where it
stopped. It is run as a script in a process of its own, because pip reconfigures logging when it is imported.

    python pip_file.py PACKAGE FILENAME DESTINATION
"""

import hashlib
import sys
from pathlib import Path

CHUNK = 1 << 18


def download(package: str, filename: str, destination: Path) -> None:
    """Write `filename` of `package` to `destination`; a partial file is continued.

    Raises:
        FileNotFoundError: no index has the file, or no index could be reached.
        ConnectionError: the transfer broke off, or its sha256 is not the index's.
    """
    from pip._internal.commands.download import DownloadCommand  # not a public interface: tried with pip 22.0 to 26.3

    command = DownloadCommand("download", "")
    with command.main_context():
        # ":none:" lifts a configured preference for wheels or sources; the row names the file.
        options, _ = command.parse_args(["--no-deps", "--no-binary", ":none:", "--only-binary", ":none:", package])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session, ignore_requires_python=True)
        links = [c.link for c in finder.find_all_candidates(package) if c.link.filename == filename]
        if not links:
            raise FileNotFoundError(f"no package index could be reached that offers {filename}")
        link = links[0]

        done = destination.stat().st_size if destination.exists() else 0
        # "identity": a compressed transfer would be undone silently, and the sizes and hashes would not be the file's.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        response = session.get(link.url_without_fragment, headers=headers, stream=True)
        if response.status_code != 416:  # 416: nothing is left to send, the partial file was whole
            response.raise_for_status()
            with destination.open("ab" if response.status_code == 206 else "wb") as file:
                expected = file.tell() + int(response.headers.get("Content-Length", 0))
                while chunk := response.raw.read(CHUNK):
                    file.write(chunk)
            if destination.stat().st_size < expected:
                raise ConnectionError(f"the connection broke off within {filename}")
        if link.hash and link.hash_name:
            with destination.open("rb") as file:
                if hashlib.file_digest(file, link.hash_name).hexdigest() != link.hash:
                    destination.unlink()
                    raise ConnectionError(f"{filename} arrived damaged; run the command again")


if __name__ == "__main__":
    try:
        download(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except OSError as error:
        sys.exit(str(error))
    except Exception as error:  # whatever else went wrong: the parent process reports one line
        sys.exit(f"{type(error).__name__}: {error}")
