"""A server that speaks as much S3 as Snakemake's storage plugin asks for, over files in a folder."""

import datetime
import email.utils
import hashlib
import http.server
import os
import shutil
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import escape

from tests.conftest import served

#: uploads in one piece or in parts, without checksums appended to the stream, which the server does not read
ENVIRONMENT = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_EC2_METADATA_DISABLED": "true",
               "SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "key", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "secret",
               "SNAKEMAKE_STORAGE_S3_REGION": "us-east-1"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_):
        pass

    def _parts(self):
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        return self.root / bucket, key, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def _answer(self, code=200, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self):
        self._answer(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")

    def _facts(self, path):
        stat = path.stat()
        return {"Last_Modified": email.utils.formatdate(stat.st_mtime, usegmt=True), "ETag": f'"{stat.st_mtime_ns:x}"',
                "Accept_Ranges": "bytes"}

    def do_HEAD(self):
        bucket, key, _ = self._parts()
        path = bucket / key if key else bucket
        if not (path.is_file() if key else path.is_dir()):
            return self._missing()
        self._answer(**(self._facts(path) | {"Content_Length": str(path.stat().st_size)} if key else {}))

    def do_GET(self):
        bucket, key, query = self._parts()
        if not key:
            return self._list(bucket, query.get("prefix", ""))
        path = bucket / key
        if not path.is_file():
            return self._missing()
        size = path.stat().st_size
        first, last, code, more = 0, size - 1, 200, {}
        if wanted := self.headers.get("Range"):
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last, code = int(low), min(int(high or size), size - 1), 206
            more = {"Content_Range": f"bytes {first}-{last}/{size}"}
        with open(path, "rb") as file:
            file.seek(first)
            self._answer(code, file.read(last - first + 1), **self._facts(path), **more)

    def _list(self, bucket, prefix):
        items = []
        for path in sorted(path for path in bucket.rglob("*") if path.is_file()):
            key = str(path.relative_to(bucket))
            if key.startswith(prefix):
                when = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
                items.append(f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                             f"<ETag>x</ETag><Size>{path.stat().st_size}</Size></Contents>")
        self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>".encode())

    def do_PUT(self):
        bucket, key, query = self._parts()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if key and "partNumber" in query:
            path = self.root / ".parts" / query["uploadId"] / query["partNumber"].zfill(6)
        else:
            path = bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if key:
            path.write_bytes(body)
        else:
            path.mkdir(exist_ok=True)
        self._answer(ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def do_POST(self):
        bucket, key, query = self._parts()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "uploads" in query:
            body = f"<InitiateMultipartUploadResult><UploadId>{os.urandom(8).hex()}</UploadId></InitiateMultipartUploadResult>"
            return self._answer(200, body.encode())
        path = bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = self.root / ".parts" / query["uploadId"]
        with open(path, "wb") as file:
            for part in sorted(parts.iterdir()):
                file.write(part.read_bytes())
        shutil.rmtree(parts)
        self._answer(200, b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")

    def do_DELETE(self):
        bucket, key, _ = self._parts()
        (bucket / key).unlink(missing_ok=True)
        self._answer(204)


def store(folder: Path):
    """Serve a folder, whose subfolders are buckets; gives the address."""
    return served(type("Handler", (_Handler,), {"root": folder}))
