"""A stub of Kaggle's server on this machine, for the real client to talk to, and a wheel with next to nothing in it."""

import json
import os
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER = "some-body"
KEY = "not-to-be-sent-0123456789"


class Stub(ThreadingHTTPServer):
    """Kaggle's server, as far as the client asks it: keeps data sets and kernels, and every request.

    refuse: dict, last part of a request's path -> (status, answer) in place of the usual one; an answer that is text
    is a page, as the servers before Kaggle's own send. stumbles: the same with a list of answers, one a call, before
    the usual one. after: dict of the same, which lets a call take effect and then answers something else.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.requests, self.blobs, self.refuse, self.stumbles, self.after = [], {}, {}, {}, {}
        self.datasets, self.kernels = {}, {}
        self.states = {}  # slug -> states to be told, one a look
        self.files = {}  # slug -> names of the files in a kernel's output

    def answer(self, method, request):
        """(status, answer) of a call of the API; method: its name, request: its JSON."""
        if method in self.refuse:
            return self.refuse[method]
        if self.stumbles.get(method):
            return self.stumbles[method].pop(0)
        usual = self.usual_answer(method, request)
        return self.after[method].pop(0) if self.after.get(method) else usual

    def usual_answer(self, method, request):
        slug = request.get("datasetSlug") or request.get("slug") or request.get("kernelSlug") or ""
        if method == "StartBlobUpload":
            token = f"token-{len(self.blobs)}"
            self.blobs[token] = [request["name"], None]
            return 200, {"token": token, "createUrl": f"http://blobs.invalid/{token}"}
        if method in ("CreateDataset", "CreateDatasetVersion"):
            files = [file["token"] for file in (request.get("body") or request)["files"]]
            self.datasets[slug] = {name: body for name, body in (self.blobs[token] for token in files)}
            return 200, {"status": "Ok", "url": f"https://www.kaggle.com/datasets/{USER}/{slug}"}
        if method == "GetDatasetStatus":
            # Not 404: whether somebody else has a private one is nobody's business.
            return (200, {"status": "READY"}) if slug in self.datasets else failure(403, "Permission was denied")
        if method == "SaveKernel":
            own = request["slug"]
            known = {*(f"{USER}/{s}" for s in self.datasets), *self.kernels}
            bad = {
                "invalidDatasetSources": [r for r in request.get("datasetDataSources", []) if r not in known],
                "invalidKernelSources": [r for r in request.get("kernelDataSources", []) if r not in known],
            }
            self.kernels[own] = request
            return 200, {"url": f"https://www.kaggle.com/code/{own}", "versionNumber": 1, **bad}
        if method in ("GetKernelSessionStatus", "ListKernelFiles"):
            if f"{USER}/{slug}" not in self.kernels:
                return failure(403, "Permission 'kernels.get' was denied")
        if method == "ListKernelFiles":  # a page of three, so that there are some
            names, first = self.files.get(slug, []), int(request.get("pageToken") or 0)
            page = [{"name": name, "size": 1, "creationDate": "2026-01-01"} for name in names[first : first + 3]]
            more = {"nextPageToken": str(first + 3)} if len(names) > first + 3 else {}
            return 200, {"files": page, **more}
        if method == "GetKernelSessionStatus":
            states = self.states.get(slug, [])
            return 200, {"status": states.pop(0) if states else "COMPLETE"}
        return 404, {"message": f"the stub does not know {method}"}


def failure(status, message):
    """(status, answer) as the service words its own errors: the client then shows the message alone."""
    return status, {"code": status, "message": message}


class StubHandler(BaseHTTPRequestHandler):
    def read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status, answer):
        body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.read_body()
        method = self.path.rpartition("/")[2]
        self.server.requests.append((method, body))
        self.send(*self.server.answer(method, json.loads(body or b"{}")))

    def do_PUT(self):
        body = self.read_body()
        self.server.requests.append(("PUT", body))
        self.server.blobs[self.path.rpartition("/")[2]][1] = body
        self.send(*self.server.refuse.get("PUT", (200, {})))

    def log_message(self, *arguments):
        pass


@contextmanager
def running_stub():
    server = Stub()
    # shutdown waits for the loop's next round.
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client_environment(server, folder):
    """Nothing of the caller's account or proxies; http goes to the stub, https nowhere."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "KAGGLE_CONFIG_DIR": str(folder),
        "KAGGLE_USERNAME": USER,
        "KAGGLE_KEY": KEY,
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "HTTP_PROXY": f"http://127.0.0.1:{server.server_port}",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "",
    }


def write_wheel(folder, module="no_such_thing"):
    folder.mkdir(parents=True, exist_ok=True)
    name = module.replace("_", "-")
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", "answer = 42\n")
        wheel.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{module}-1.0.dist-info/WHEEL", tag)
        wheel.writestr(f"{module}-1.0.dist-info/RECORD", "")
