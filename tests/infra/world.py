"""The world around an installation, on a host of its own: a DNS server that says what is published, and a mail exchanger that takes everything.

`python -m tests.infra.world ADDRESS FOLDER`. Lines of standard input are records to publish, and each is answered by a line when it is. Every message is
a file of FOLDER, its first line says how it came: by TLS or not, from which address, and with which name in the greeting. Who is of the installation may
change records at port 8053, by what a command of `dns.command` gets; the answer is a line.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

from mail_pipelines.domains.records import zone_value
from tests.parts.dns import Zone, serving


class Exchanger:
    """An SMTP server with STARTTLS and nothing else of note."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=mx.people.test", "-days", "2"]
        subprocess.run([*words, "-keyout", folder / "key", "-out", folder / "certificate"], check=True, capture_output=True)
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(folder / "certificate", folder / "key")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting, encrypted = "", False
        writer.write(b"220 mx.people.test ESMTP\r\n")
        while line := await reader.readline():
            verb, _, argument = line.decode().strip().partition(" ")
            match verb.upper():
                case "EHLO":
                    greeting = argument
                    writer.write(b"250 mx.people.test\r\n" if encrypted else b"250-mx.people.test\r\n250 STARTTLS\r\n")
                case "STARTTLS":
                    writer.write(b"220 go on\r\n")
                    await writer.start_tls(self._tls)
                    encrypted = True
                case "DATA":
                    writer.write(b"354 go on\r\n")
                    message = (await reader.readuntil(b"\r\n.\r\n"))[:-3].replace(b"\r\n..", b"\r\n.")
                    how = f"{'TLS' if encrypted else 'plain'} {writer.get_extra_info('peername')[0]} {greeting}\n"
                    place = self._folder / f"{next(self._numbers)}"
                    place.with_suffix(".new").write_bytes(how.encode() + message)
                    place.with_suffix(".new").rename(place.with_suffix(".mail"))
                    writer.write(b"250 taken\r\n")
                case "QUIT":
                    writer.write(b"221 bye\r\n")
                    break
                case _:
                    writer.write(b"250 ok\r\n")
        writer.close()


def publish(zone: Zone) -> None:
    for line in sys.stdin:
        zone.publish(line)
        print(line, end="", flush=True)  # noqa: T201


async def change(zone: Zone, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As the API of a DNS hoster: all records of a name's type are one set."""
    asked = json.loads(await reader.read())
    for record in asked["records"]:
        values = [zone_value(record["type"], value) for value in record["values"]] if asked["action"] == "publish" else []
        zone.replace(record["name"], record["type"], record["ttl"], values)
    writer.write(b"done\n")
    writer.close()


async def main(address: str, folder: Path) -> None:
    zone = Zone()
    with serving(zone, address, 53):
        server = await asyncio.start_server(Exchanger(folder).serve, address, 25)
        await asyncio.start_server(partial(change, zone), address, 8053)
        threading.Thread(target=publish, args=(zone,), daemon=True).start()
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
