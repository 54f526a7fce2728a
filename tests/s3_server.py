"""A server of S3's interface on this machine; what it holds outlives its being stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import boto3
from moto.server import ThreadedMotoServer


class Server:
    """Listens at `ip`."""

    def __init__(self, ip: str = "127.0.0.1") -> None:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # A line for each request.
        self._ip, self._port = ip, 0
        self.delay_seconds = 0.0
        """How long it takes over each request."""
        self.start()

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address=self._ip, port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        server = self._server._server
        app = server.app

        def slow(*request: Any) -> Any:
            time.sleep(self.delay_seconds)
            return app(*request)

        server.app = slow
        self.address = f"http://{self._ip}:{self._port}"

    def stop(self) -> None:
        self._server.stop()

    @property
    def env(self) -> Mapping[str, str]:
        """For processes that are to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.address,
            "AWS_MAX_ATTEMPTS": "1",  # The library's own tries, which would hide an outage of seconds.
        }

    def store(self, bucket: str) -> str:
        """The URL of an empty store, in a new bucket."""
        keys = {name.lower(): value for name, value in self.env.items() if name.endswith("KEY_ID") or "SECRET" in name}
        boto3.client("s3", endpoint_url=self.address, region_name="us-east-1", **keys).create_bucket(Bucket=bucket)
        return f"s3://{bucket}/store"
