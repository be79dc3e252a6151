"""Clients that leave in the middle of their streams, two hundred at a time, while the engine lives.

`python benchmarks/reliability/drops.py [--rounds 40]` serves the demo.
"""

import argparse
import http.client
import json
import socket
import time

from chaos import LONG, SHORT, Server


def main() -> None:
    """Prints how many rounds the engine outlived; exits with 1 if it did not outlive all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    num_rounds = parser.parse_args().rounds
    server = Server()
    body = json.dumps({**LONG, "temperature": 1, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    try:
        for i in range(num_rounds):
            clients = [socket.create_connection((server.target.host, server.target.port)) for _ in range(200)]
            for client in clients:
                client.sendall(head.encode() + b"\r\n\r\n" + body)
            for client in clients[:20]:
                client.recv(100)
            for client in clients:
                client.close()
            time.sleep(0.5)
            connection = http.client.HTTPConnection(server.target.host, server.target.port, timeout=30)
            connection.request("POST", "/v1/completions", json.dumps(SHORT), {"Content-Type": "application/json"})
            if (status := connection.getresponse().status) != 200:
                raise SystemExit(f"status {status} in round {i + 1}: {server.text()[-300:]}")
    finally:
        server.process.terminate()
        server.process.wait(30)
    print(f"the engine outlived {num_rounds} rounds")


if __name__ == "__main__":
    main()
