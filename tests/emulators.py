"""Buckets of Google and of S3 on this machine: `python tests/emulators.py gs` (or s3).

They are what pip installs, gcp-storage-emulator and moto, and answer one request after the other.
The former knows no conditions, by which a client writes only what nobody else has written
meanwhile. They are added here, for tensorstore and the owner of a run need them.
"""

import contextlib
import functools
import http
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

BUCKET = "bucket"
# The variables that lead clients to an emulator, without credentials of anybody.
VARIABLES = {
    "gs": {
        "STORAGE_EMULATOR_HOST": "{url}",
        "TENSORSTORE_GCS_HTTP_URL": "{url}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GOOGLE_CLOUD_PROJECT": "none",
        # A service beside that of the objects, which the emulator lacks.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    },
    "s3": {
        "AWS_ENDPOINT_URL": "{url}",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
    },
}


@contextlib.contextmanager
def running(kind):
    """An emulator with an empty bucket; yields the variables for those who use it."""
    process = subprocess.Popen(
        [sys.executable, __file__, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
    )
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), f"the emulator of {kind} did not start"
        yield {name: value.format(url=url) for name, value in VARIABLES[kind].items()}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def serve_s3():
    """moto with one bucket, at the address that is returned."""
    import boto3
    import moto.server
    from werkzeug.serving import make_server

    app = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)
    lock = threading.Lock()

    def one_at_a_time(environ, start_response):
        with lock:
            return list(app(environ, start_response))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.port}"
    keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    boto3.client("s3", "us-east-1", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
    return url


def serve_gs():
    """gcp-storage-emulator with one bucket, at the address that is returned."""
    import gcp_storage_emulator.server as emulator

    emulator.HANDLERS = tuple(
        (pattern, {method: conditional(handler) for method, handler in handlers.items()})
        for pattern, handlers in emulator.HANDLERS
    )
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    return f"http://127.0.0.1:{server._api._httpd.server_port}"


def conditional(handler):
    """A handler of requests that keeps to the generation that a client names, and tells it."""

    @functools.wraps(handler)
    def handle(request, response, storage, *args, **kwargs):
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        if name is None and request.query.get("uploadType") == ["multipart"]:
            name = request.data["meta"].get("name")
        bucket = request.params.get("bucket_name")
        before = generation(storage, bucket, name)
        same, other = (
            int(request.query.get(key, [-1])[0])
            for key in ("ifGenerationMatch", "ifGenerationNotMatch")
        )
        if same not in (-1, before):
            response.status = http.HTTPStatus.PRECONDITION_FAILED
            return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        if other == before:
            response.status = http.HTTPStatus.NOT_MODIFIED
            return None
        result = handler(request, response, storage, *args, **kwargs)
        if name is not None and (now := generation(storage, bucket, name)):
            response["x-goog-generation"] = str(now)
        return result

    return handle


def generation(storage, bucket, name):
    """Of an object; 0 where there is none."""
    from gcp_storage_emulator.exceptions import NotFound

    if not bucket or not name:
        return 0
    with contextlib.suppress(NotFound):
        return int(storage.get_file_obj(bucket, name)["generation"])
    return 0


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # the folder of tests hides no package
    print({"gs": serve_gs, "s3": serve_s3}[sys.argv[1]](), flush=True)
    signal.pause()
