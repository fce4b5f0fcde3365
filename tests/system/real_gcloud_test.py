"""Compares the fakes of gcloud with the installed gcloud, which calls a small local server instead of Google's.

gcloud's waits are skipped (sitecustomize), and its messages are compared word by word, except for addresses.
"""

import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests import runs
from tests.system import babysitter_cloud

SDK = pathlib.Path(os.path.realpath(shutil.which("gcloud") or "/")).parent.parent
MESSAGES = SDK / "lib/googlecloudsdk/generated_clients/apis/tpu/v2/tpu_v2_messages.py"
PLACE, OPERATION = babysitter_cloud.PLACE, f"{babysitter_cloud.PLACE}/operations/operation-1"
TIME = "2026-11-29T09:00:00.123456789Z"
ZONE = ["--project=run", "--zone=us-east5-b", "--quiet"]
DESCRIBE = ["compute", "tpus", "queued-resources", "describe", "run", "--format=value(state.state)", *ZONE]
TOKEN = {"access_token": "a", "expires_in": 3000, "token_type": "Bearer"}

pytestmark = pytest.mark.skipif(not MESSAGES.exists(), reason="no Google Cloud CLI here")


class Service(http.server.ThreadingHTTPServer):
    """A server of queued resources with Google's API. If `says` is set, it is the answer to everything except the
    login."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.resources: dict[str, dict] = {}
        self.says = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: str):
        if path == "/token":
            return 200, TOKEN
        if self.says is not None:
            return self.says
        path, _, query = path.removeprefix("/v2/").partition("?")
        what, _, name = path.removeprefix(f"{PLACE}/").partition("/")
        if what == "operations":
            return 200, {"name": path, "done": True, "response": {}}
        if what == "queuedResources":
            return self.resource(method, path, name, query, body)
        nodes = [self.machine(found["tpu"]["nodeSpec"][0]["nodeId"]) for found in self.resources.values()]
        if not name:
            return 200, {"nodes": nodes}
        return next(((200, node) for node in nodes if node["name"] == path), refusal(404, "NOT_FOUND", path))

    def resource(self, method: str, path: str, name: str, query: str, body: str):
        if method == "POST":
            name = dict(pair.split("=") for pair in query.split("&"))["queuedResourceId"]
            if name in self.resources:
                return refusal(409, "ALREADY_EXISTS", f"{path}/{name}")
            made = {
                "name": f"{path}/{name}",
                "createTime": "2026-11-29T09:00:00.123456789Z",
                "state": {"state": "ACTIVE"},
            }
            self.resources[name] = json.loads(body) | made
            return 200, {"name": OPERATION}
        if not name:
            return 200, {"queuedResources": list(self.resources.values())}
        if name not in self.resources:
            return refusal(404, "NOT_FOUND", path)
        if method == "DELETE":
            del self.resources[name]
            return 200, {"name": OPERATION}
        return 200, self.resources[name]

    def machine(self, name: str) -> dict:
        ends = [{"ipAddress": "127.0.0.1"}] * 2
        return {"name": f"{PLACE}/nodes/{name}", "state": "READY", "apiVersion": "V2", "networkEndpoints": ends}


def refusal(code: int, status: str, path: str):
    said = "already exists" if code == 409 else "was not found"
    return code, {"error": {"code": code, "status": status, "message": f"Resource '{path}' {said}"}}


def trouble(code: int, status: str, message: str):
    return code, {"error": {"code": code, "message": message, "status": status}}


class Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        found = self.server.answer(self.command, self.path, body)
        self.close_connection = True
        if found == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif found == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            code, data = found
            text = (data if isinstance(data, str) else json.dumps(data)).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Connection", "close")  # otherwise a request may come on a connection that is being closed
            self.end_headers()
            self.wfile.write(text)

    do_GET = do_POST = do_DELETE = answer


class Gcloud:
    """The installed gcloud, logged in as me@x.org."""

    def __init__(self, folder: pathlib.Path, service: Service):
        self.folder, self.service = folder, service
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
        own = f"http://127.0.0.1:{service.server_port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CLOUDSDK_")},
            "CLOUDSDK_CONFIG": str(folder),
            "CLOUDSDK_PYTHON_SITEPACKAGES": "1",
            "PYTHONPATH": str(folder / "site"),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{own}/",
            "CLOUDSDK_AUTH_TOKEN_HOST": f"{own}/token",
            "CLOUDSDK_CORE_ACCOUNT": "me@x.org",
        }
        words = ["auth", "activate-refresh-token", "me@x.org", "r", "--quiet"]
        assert not self.run(*words).returncode

    def run(self, *argv: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["gcloud", *argv], env=self.environment | environment, text=True, capture_output=True, timeout=120
        )


@pytest.fixture(scope="module")
def gcloud(tmp_path_factory) -> Iterator[Gcloud]:
    service = Service()
    yield Gcloud(tmp_path_factory.mktemp("gcloud"), service)
    service.shutdown()
    service.server_close()


def plain(text: str) -> str:
    """The text without addresses, hints after a crash, and parts that depend on this server."""
    text = re.sub(r"http://127.0.0.1:\d+/v2/\S*?(?=[?])", babysitter_cloud.URL, text)
    text = re.sub(r"url: /v2/\S+", "url: /v2", text)
    text = re.sub(r"<\{.*'status'", "<{'content-type': 'application/json', 'status'", text)
    text = re.sub(r"<urllib3\S+ object at 0x\w+>", "...", text)
    for host, port, google in (("127.0.0.1", 9, "tpu"), ("tpu.invalid", 80, "tpu"), ("oauth2.invalid", 443, "oauth2")):
        text = re.sub(rf"HTTPS?ConnectionPool\(host='{host}', port={port}\)",
                      f"HTTPSConnectionPool(host='{google}.googleapis.com', port=443)", text)  # fmt: skip
    text = text.replace("tpu.invalid", "tpu.googleapis.com").replace("oauth2.invalid", "oauth2.googleapis.com")
    text = re.sub(r"\n\nTo check gcloud.*|If you have already.*", "", text, flags=re.DOTALL)
    return re.sub(r"^ERROR: \(gcloud\S+\) ", "", text).strip()


# For each failure of the model: the answer of the service, or settings with a wrong address.
FAILURES = {
    503: trouble(503, "UNAVAILABLE", "The service is currently unavailable."),
    500: trouble(500, "INTERNAL", "Internal error encountered."),
    504: trouble(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
    "ConnectionResetError": "reset",
    "RemoteDisconnected": "close",
    "InvalidData": (200, '{"name": "x", '),
    "per minute": trouble(
        429,
        "RESOURCE_EXHAUSTED",
        "Quota exceeded for quota metric 'Read requests' and limit 'Read requests per minute' of service "
        "'tpu.googleapis.com' for consumer 'project_number:1'.",
    ),
    "Resource 'projects/run' was": trouble(404, "NOT_FOUND", "Resource 'projects/run' was not found"),
    "refused": {"CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://127.0.0.1:9/"},
    "Failed to resolve 'tpu": {"CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://tpu.invalid/"},
    "auth tokens": {"CLOUDSDK_AUTH_TOKEN_HOST": "https://oauth2.invalid/token"},
}


@pytest.mark.slow
@pytest.mark.parametrize("sign", FAILURES, ids=str)
def test_failures_of_the_model(gcloud, sign):
    """Each message of the model equals a message of the installed gcloud, word by word; all are compared."""
    modelled = [said for said in babysitter_cloud.LOST + babysitter_cloud.REFUSED if isinstance(said, str)]
    assert len(modelled) == len(FAILURES)
    gcloud.service.says, environment = FAILURES[sign], {}
    if isinstance(FAILURES[sign], dict):
        gcloud.service.says, environment = None, FAILURES[sign]
    if sign == "auth tokens":
        (gcloud.folder / "access_tokens.db").unlink()
    found = gcloud.run(*DESCRIBE, **environment)
    gcloud.service.says = None
    assert found.returncode == 1
    (said,) = [said for said in modelled if (f"'status': {sign}}}" if isinstance(sign, int) else sign) in said]
    assert plain(found.stderr) == plain(said)


def test_states():
    """All states that the scripts and the model name are states of the API."""
    text = MESSAGES.read_text()
    resources, nodes = text.partition("class QueuedResourceState")[2], text.partition("class Node(")[2]
    known = {
        word
        for part in (resources, nodes)
        for word in re.findall(
            r"^    ([A-Z_]+) = \d+$", part.partition("StateValueValuesEnum(")[2][:3500], re.MULTILINE
        )
    }
    script = (runs.ROOT / "launch/tpu/babysit.sh").read_text() + (runs.ROOT / "launch/tpu/cloud.sh").read_text()
    in_scripts = {word for found in re.findall(r"\(([A-Z_]+(?:\|[A-Z_]+)+)\)", script) for word in found.split("|")}
    of_errors = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "ABORTED", "CANCELLED", "RATE_LIMIT"}
    assert {"ACTIVE", "PREEMPTED", "SUSPENDED"} <= in_scripts and in_scripts - of_errors <= known
    model = set(re.findall(r'"([A-Z_]{5,})"', (runs.ROOT / "tests/system/babysitter_cloud.py").read_text()))
    assert model - of_errors - {"ERROR"} <= known | {"GONE"}


@pytest.mark.slow
def test_the_fake_says_what_the_real_one_says(gcloud, tmp_path):
    """The same calls, to a cloud that is empty at first, give the same exit codes, results and messages."""
    queued, machine = ["compute", "tpus", "queued-resources"], ["compute", "tpus", "tpu-vm"]
    script = (runs.ROOT / "launch/tpu/cloud.sh").read_text()
    fields = re.search(r"^FIELDS='(.*)'", script, re.MULTILINE)[1]
    create = [*queued, "create", "run", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]
    create += ["--node-id=run", "--spot", "--labels=meshlm=me-1", "--valid-until-duration=6h"]
    calls = [
        [*queued, "describe", "run", f"--format={fields}"],
        [*queued, "delete", "run", "--force"],
        [*queued, "list", "--format=csv[no-heading](name.basename(),state.state)"],
        [*machine, "describe", "run", "--format=value(networkEndpoints.len())"],
        [*machine, "ssh", "run", "--worker=0", "--command=true"],
        create,
        create,
        [*queued, "describe", "run", f"--format={fields}"],
        [*queued, "list", "--format=csv[no-heading](name.basename(),state.state)"],
        [*machine, "list", "--format=csv[no-heading](name.basename(),state)"],
        [*machine, "describe", "run", "--format=value(networkEndpoints.len())"],
        [*queued, "delete", "run", "--force"],
        [*queued, "describe", "run", f"--format={fields}"],
    ]
    fake = {**os.environ, "FAKE_CLOUD": str(tmp_path), "FAKE_PYTHON": sys.executable}
    for call in calls:
        real = gcloud.run(*call, *ZONE)
        argv = [runs.ROOT / "tests/system/fakes/cloud/gcloud", *call, *ZONE]
        found = subprocess.run(argv, env=fake, text=True, capture_output=True, timeout=60)
        assert found.returncode == real.returncode, (call, found.stderr, real.stderr)
        times = re.compile(r"\d{4}-\d\d-\d\dT[^,\n]*|\d{15,}")
        assert times.sub("TIME", found.stdout).strip() == times.sub("TIME", real.stdout).strip(), call
        dots = re.compile(r"^\.+")
        assert [dots.sub(".", line) for line in found.stderr.splitlines()] == [
            dots.sub(".", line) for line in real.stderr.splitlines()
        ], call


EXCEPTIONS = """
import sys
sys.path[:0] = [f"{sys.argv[1]}/lib", f"{sys.argv[1]}/lib/third_party"]
from googlecloudsdk.command_lib.compute.tpus.tpu_vm import exceptions
from googlecloudsdk.command_lib.util.ssh import ssh
for error in (ssh.CommandError("/usr/bin/ssh", return_code=255), exceptions.SSHKeyNotInAgent("k")):
    print(error.exit_code, error)
"""


def test_what_ssh_says():
    """Compares the messages for a broken connection and for an SSH agent with another key, which gcloud refuses for
    several workers at once."""
    done = subprocess.run([sys.executable, "-c", EXCEPTIONS, SDK], text=True, capture_output=True, timeout=60)
    broken, agent = done.stdout.splitlines()
    assert broken == "255 [/usr/bin/ssh] exited with return code [255]."
    assert broken.partition(" ")[2] in babysitter_cloud.World("0").broken(255, babysitter_cloud.SILENT[0])
    code, _, said = agent.partition(" ")
    assert code == "1" and said in (runs.ROOT / "tests/system/fakes/cloud/gcloud").read_text().replace('\\"', '"')
