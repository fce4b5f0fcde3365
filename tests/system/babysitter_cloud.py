"""A model of the cloud for babysitter_histories_test.py: queued resources, their workers, and what goes wrong.

Instead of gcloud, the scripts of launch/tpu/ call histories.sh, which asks this model. The clock of a world advances
by a tick each time the babysitter describes its queued resource; a seed decides what happens. Messages are those of
gcloud 528 (tests/system/real_gcloud_test.py compares them with messages of the installed gcloud).
"""

import dataclasses
import random
import re
import shlex
import socket
import socketserver
import threading

PLACE = "projects/run/locations/us-east5-b"  # the project has the same name as the queued resource
COMMAND = ["python", "-m", "launch.train", "--workdir=bucket/runs/x"]
DEAD = ("FAILED", "SUSPENDED")
URL = "https://tpu.googleapis.com/v2/" + PLACE
REPORT = "If you would like to report this issue, please run the following command:\n  gcloud feedback\n"
CRASH = f"ERROR: gcloud crashed ({{}}): {{}}\n\n{REPORT}"
ISSUED = "{} request issued for: [{}]\nWaiting for operation [" + PLACE + "/operations/operation-1] to complete...\n"
# Messages of ssh if a worker is silent, and if the error is on this machine.
SILENT = ["ssh: connect to host 1.2.3.4 port 22: Connection timed out", "Connection closed by 1.2.3.4 port 22"]
BROKEN = ["me@1.2.3.4: Permission denied (publickey).", "ssh: connect to host 1.2.3.4 port 22: Network is unreachable"]
WHOM = "This command is authenticated as me@x.org which is the active account specified by the [core/account] property"
VERBS = ("setup", "start", "status", "stop", "log")
LATE = 124  # the exit code if an answer does not come in time


def http_error(code: int, status: str, text: str) -> str:
    content = f'{{"error": {{"code": {code}, "message": "{text}", "status": "{status}"}}}}'
    return (
        f"HttpError accessing <{URL}?alt=json>: response: <{{'content-type': 'application/json', 'status': {code}}}>, "
        f"content <{content}>\nThis may be due to network connectivity issues. Please check your network settings, and "
        "the status of the service you are trying to reach."
    )


# The action may have been carried out, but its answer was lost.
LOST = [
    http_error(503, "UNAVAILABLE", "The service is currently unavailable."),
    http_error(500, "INTERNAL", "Internal error encountered."),
    http_error(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
    CRASH.format("ConnectionError", "('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))"),
    CRASH.format(
        "ConnectionError",
        "('Connection aborted.', RemoteDisconnected('Remote end closed connection without response'))",
    ),
    CRASH.format(
        "InvalidDataFromServerError",
        'Error decoding response "{"name": "x", " as type QueuedResource: Expecting property name enclosed in double '
        "quotes: line 1 column 15 (char 14)",
    ),
    LATE,
]
# No action was carried out.
REFUSED = [
    CRASH.format(
        "ConnectionError",
        "HTTPSConnectionPool(host='tpu.googleapis.com', port=443): Max retries exceeded with url: /v2 (Caused by "
        "NewConnectionError('...: Failed to establish a new connection: [Errno 111] Connection refused'))",
    ),
    CRASH.format(
        "ConnectionError",
        "HTTPSConnectionPool(host='tpu.googleapis.com', port=443): Max retries exceeded with url: /v2 (Caused by "
        "NameResolutionError(\"...: Failed to resolve 'tpu.googleapis.com' ([Errno -2] Name or service not known)\"))",
    ),
    "There was a problem refreshing your current auth tokens: HTTPSConnectionPool(host='oauth2.googleapis.com', "
    'port=443): Max retries exceeded with url: /token (Caused by NameResolutionError("...: Failed to resolve '
    "'oauth2.googleapis.com' ([Errno -2] Name or service not known)\"))\nPlease run:\n\n  $ gcloud auth login\n\n"
    "to obtain new credentials.\n",
    "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests' and limit 'Read requests per minute' of "
    "service 'tpu.googleapis.com' for consumer 'project_number:1'.",
    f"NOT_FOUND: Resource 'projects/run' was not found. {WHOM}",
    LATE,
]


@dataclasses.dataclass
class Worker:
    is_set_up: bool = False
    mounted: bool = False
    told: list[str] | None = None  # the arguments of `start`; None if nothing was started
    call: str = ""
    running: bool = False
    code: int | None = None
    epoch: int = 0  # the epoch of the resource when this worker's command was started
    silent: int = 0  # the worker does not answer for this many ticks
    late: list = dataclasses.field(default_factory=list)  # pending actions of calls that timed out


@dataclasses.dataclass
class Resource:
    name: str
    by: str  # us, or others
    kind: str
    slices: int
    created: str
    label: str
    state: str
    ahead: list[str]
    workers: dict[tuple[str, int], Worker] = dataclasses.field(default_factory=dict)
    epoch: int = 0  # increases when the workers' processes no longer form one group
    bare: bool = False  # during deletion, the description has only state and creation time

    @property
    def nodes(self) -> list[str]:
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def bills(self) -> bool:
        return self.state not in DEAD

    def is_healthy(self) -> bool:
        """Whether the command runs on all workers, as one group of processes."""
        fine = (worker.running and worker.epoch == self.epoch for worker in self.workers.values())
        return self.state == "ACTIVE" and bool(self.workers) and all(fine)


class World:
    """The resources and events of a zone, which a seed determines. Hold the lock to read or change a world."""

    def __init__(self, seed: str):
        dice = random.Random(seed)
        self.seed, self.lock = seed, threading.Condition()
        self.tick = 0
        self.log: list[str] = []
        self.violations: list[str] = []
        self.resources: dict[str, Resource] = {}
        self.counts: dict[str, int] = {}
        self.slices, self.hosts, self.kind = dice.choice([1, 1, 1, 2]), dice.choice([1, 1, 2]), "v6e-16"
        self.fault_rate = dice.choice([0, 0.03, 0.1, 0.1, 0.3])
        self.event_rate = dice.choice([0, 0.05, 0.15, 0.3])
        self.others_rate = dice.choice([0, 0, 0.1])
        self.calm = dice.choice([3, 6, 12, 25])  # no faults from this tick on
        self.outage = range(first := dice.choice([0, 2, 5, 99, 99]), first + dice.choice([1, 2, 5]))
        self.outage_at_end = dice.choice([0, 0, 0, 0, 3, 8, 30])  # ticks after the run at which a last outage ends
        self.stubborn = dice.choice([0, 0, 0, 0, 0, 1, 4, 12])  # this many deletions fail
        self.length, self.step = dice.randrange(1, 6), 0
        self.ends = dice.choices([1, 2, 3, 4, 42, 130, 137], [6, 1, 1, 1, 6, 1, 3], k=1)  # exit codes of an attempt
        self.stuck = dice.random() < 0.1  # attempts make no progress
        self.made = 0
        self.asked_to_stop = False  # the person or --max_hours has asked for a stop
        # The number of rounds with a silent worker since all workers last answered, and whether this round has a silent
        # worker.
        self.silent_rounds, self.is_silent = 0, False
        self.answered: set[tuple[str, int]] = set()
        self.adopts = False  # the person adopts the resource that the next answer shows
        self.coming: list[tuple[int, Resource]] = []  # (tick at which the resource becomes visible, resource)
        self.run_codes: set[int] = set()

    # Events

    def note(self, text: str) -> None:
        self.log.append(f"{self.tick:3} {text}")

    def violation(self, text: str) -> None:
        self.note(f"VIOLATION {text}")
        self.violations.append(text)

    def draw(self, key: str) -> random.Random:
        """A random generator that depends only on the seed and on how often `key` was drawn, not on concurrent
        calls."""
        self.counts[key] = self.counts.get(key, 0) + 1
        return random.Random(f"{self.seed} {key} {self.counts[key]}")

    def make(
        self, name: str, by: str, kind: str, slices: int, label: str, state: str = "", ahead: tuple = ()
    ) -> Resource:
        self.made += 1
        dice = self.draw("states")
        long = ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        states = [state] if state else dice.choice([["ACTIVE"], long[1:], ["CREATING", *long]])
        if not state and self.tick < self.calm and dice.random() < 0.1:
            states = [*states[:-1], "FAILED"]
        made = f"2026-11-29T09:{self.made // 60:02}:{self.made % 60:02}.123456789Z"
        resource = Resource(name, by, kind, slices, made, label, states[0], states[1:], bare=dice.random() < 0.5)
        self.boot(resource)
        return resource

    def boot(self, resource: Resource) -> None:
        if resource.state == "ACTIVE" and not resource.workers:
            resource.workers = {(n, i): Worker() for n in resource.nodes for i in range(self.hosts)}

    def take_away(self, resource: Resource, state: str, *ahead: str) -> None:
        resource.state, resource.ahead, resource.workers = state, list(ahead), {}

    def go_on(self) -> None:
        """Advances the clock by a tick."""
        self.tick += 1
        dice = self.draw("world")
        for due, resource in self.coming:
            if due <= self.tick and resource.name not in self.resources:
                self.note(f"the cloud: {resource.name} is there after all")
                self.resources[resource.name] = resource
        self.coming = [(due, resource) for due, resource in self.coming if due > self.tick]
        for resource in list(self.resources.values()):
            self.grow_older(resource, dice)
        if self.tick < self.calm and "run" not in self.resources and dice.random() < self.others_rate:
            self.resources["run"] = self.make("run", "others", self.kind, self.slices, "", "ACTIVE")
            self.note("others: create run")

    def grow_older(self, resource: Resource, dice: random.Random) -> None:
        if resource.ahead and dice.random() < 0.8:
            resource.state = resource.ahead.pop(0)
            if resource.state == "GONE":
                del self.resources[resource.name]
                return
            self.boot(resource)
        for worker in resource.workers.values():
            worker.silent = max(0, worker.silent - 1)
            while worker.late and dice.random() < 0.3:
                worker.late.pop(0)()
        self.follow(resource)
        if self.tick >= self.calm or resource.by != "us" or dice.random() >= self.event_rate:
            return
        if resource.state != "ACTIVE":
            if dice.random() < 0.2 and resource.state != "DELETING" and resource.bills:
                self.take_away(resource, "FAILED")
                self.note("the cloud: FAILED")
            return
        what = dice.choice(["preempt", "restart", "restart", "exit", "exit", "exit one", "silent", "vanish"])
        self.note(f"the cloud: {what}")
        worker = dice.choice(list(resource.workers.values()))
        if what == "preempt":
            self.take_away(resource, "SUSPENDING", "SUSPENDED")
        elif what == "restart":
            worker.mounted, worker.late = False, []
            self.end(resource, [worker], 137)
            worker.code = None
        elif what == "exit":
            self.end(resource, resource.workers.values(), dice.choice(self.ends))
        elif what == "exit one":
            self.end(resource, [worker], dice.choice(self.ends))
        elif what == "silent":
            worker.silent = dice.choice([1, 2, 6])
        elif self.others_rate:
            del self.resources[resource.name]

    def end(self, resource: Resource, workers, code: int) -> None:
        for worker in workers:
            if worker.running:
                worker.running, worker.code = False, code
                self.run_codes.add(code)
                resource.epoch += bool(code)

    def follow(self, resource: Resource) -> None:
        """A healthy run takes a step; otherwise each running process may end, because its peers are gone."""
        if resource.is_healthy():
            if not self.stuck or self.tick >= self.calm:
                self.step += 1
            if self.step >= self.length:
                self.end(resource, resource.workers.values(), 0)
                if self.outage_at_end:
                    self.outage = range(self.tick + self.draw("end").choice([1, 2]), self.tick + self.outage_at_end)
                    self.calm, self.outage_at_end = max(self.calm, self.outage.stop), 0
            return
        for worker in resource.workers.values():
            if worker.running and self.draw("broken").random() < 0.4:
                done = self.step >= self.length
                self.end(resource, [worker], 0 if done else 1)

    # Calls of gcloud

    def answer(self, role: str, argv: list[str]) -> tuple[int, str, str]:
        with self.lock:
            role, _, script = role.partition(" ")
            words = [word for word in argv[2:] if not word.startswith("--")]
            flags = {w.partition("=")[0]: w.partition("=")[2] for w in argv if w.startswith("--")}
            what, verb = words[0], words[1]
            asks = f"{what.replace('-', '_')}_{verb}"
            if asks == "queued_resources_describe" and role == "babysit" and "createTime" in flags["--format"]:
                self.go_on()
                if script == "babysit.sh":  # not a script that the babysitter has called
                    self.silent_rounds += self.is_silent
                    self.is_silent, self.answered = False, set()
            key = f"{asks} {role} {' '.join(words[2:])} {flags.get('--worker', '')}"
            code, out, reason = getattr(self, asks)(role, words[2:], flags, key)
            err = reason
            if reason and not reason.startswith(("ERROR", "SSH", "SCP", "Create", "Delete", "Waiting")):
                err = f"ERROR: (gcloud.compute.tpus.{what}.{verb}) {reason}\n"
            call = " ".join([verb, *words[2:], flags.get("--worker", ""), flags.get("--command", "")[-60:]])
            self.note(f"{role}: {call} -> {code} {(out or err)[-90:]!r}")
            self.lock.notify_all()
            return code, out, err

    def fault(self, key: str, acts: bool = False) -> tuple[str, tuple[int, str, str]] | None:
        """None, or the kind of fault and the answer. An action is carried out if its answer is lost, but not if it is
        refused."""
        if self.tick >= self.calm:
            return None
        dice = self.draw(key)
        if self.tick in self.outage:
            return "refused", self.failure(dice.choice(REFUSED[:3]))
        if dice.random() >= self.fault_rate:
            return None
        how = dice.choice(["lost", "refused"] if acts else ["refused", "refused", "empty"])
        if how == "empty":
            return how, (0, "", "")
        return how, self.failure(dice.choice(LOST if how == "lost" else REFUSED))

    def failure(self, said) -> tuple[int, str, str]:
        return (LATE, "", "") if said == LATE else (1, "", said)

    def missing(self, path: str) -> tuple[int, str, str]:
        return 1, "", f"NOT_FOUND: Resource '{PLACE}/{path}' was not found. {WHOM}"

    def queued_resources_describe(self, role, names, flags, key):
        if fault := self.fault(key):
            return (
                fault[1]
                if fault[0] != "empty"
                else (0, re.sub(r"[^,]", "", flags["--format"].partition("(")[2]) + "\n", "")
            )
        found = self.resources.get(names[0])
        if role == "babysit" and self.adopts:
            self.adopts = False
            if found:
                found.by = "us"
        if found is None:
            return self.missing(f"queuedResources/{names[0]}")
        if flags["--format"].startswith("value(state.failedData"):
            return 0, "There is no more capacity in the zone\n" if found.state == "FAILED" else "\n", ""
        if "nodeIdPrefix" in flags["--format"]:
            return 0, f"{found.name}\t\n" if found.slices == 1 else f"\t{found.name}\n", ""
        fields = flags["--format"].partition("(")[2][:-1].split(",")
        count = str(found.slices) if found.slices > 1 else ""
        values = {
            "state.state": found.state, "createTime": found.created, "nodeCount": count, "labels.meshlm": found.label,
            "acceleratorType": found.kind,
        }  # fmt: skip
        if found.state == "DELETING" and found.bare:
            values |= dict.fromkeys(("nodeCount", "labels.meshlm", "acceleratorType"), "")
        row = [next(v for k, v in values.items() if f.endswith((k, k + ".basename()"))) for f in fields]
        return 0, self.with_other_text(",".join(row) + "\n", key), ""

    def with_other_text(self, answer: str, key: str) -> str:
        """Adds text to an answer: sometimes gcloud, or a wrapper of gcloud, prints its own text on stdout."""
        dice = self.draw(f"other text {key}")
        if self.tick >= self.calm or dice.random() >= self.fault_rate:
            return answer
        return dice.choice([f"Your active configuration is: [x]\n{answer}", f"{answer}\nUpdates are available.\n"])

    def queued_resources_list(self, role, names, flags, key):
        if fault := self.fault(key):
            return fault[1]
        return 0, "".join(f"{found.name},{found.state}\n" for found in self.resources.values()), ""

    def queued_resources_create(self, role, names, flags, key):
        fault = self.fault(key, acts=True)
        if fault and fault[0] == "refused":
            return fault[1]
        name = names[0]
        if name in self.resources:
            return 1, "", f"ALREADY_EXISTS: Resource '{PLACE}/queuedResources/{name}' already exists"
        dice = self.draw("create")
        label = flags.get("--labels", "").removeprefix("meshlm=")
        made = self.make(name, "us", flags["--accelerator-type"], int(flags.get("--node-count", 1)), label)
        if fault and dice.random() < 0.2:  # the resource is not visible at once
            self.coming.append((self.tick + dice.choice([1, 2]), made))
            return fault[1]
        self.resources[name] = made
        if fault and dice.random() < 0.3:  # gcloud itself has retried
            return 1, "", f"ALREADY_EXISTS: Resource '{PLACE}/queuedResources/{name}' already exists"
        issued = ISSUED.format("Create", name)
        if fault and dice.random() < 0.3:
            error = '{\n  "code": 13,\n  "message": "an internal error has occurred"\n}'
            return 1, "", f"{issued}.....failed.\nERROR: (gcloud.compute.tpus.queued-resources.create) {error}\n"
        return fault[1] if fault else (0, "", f"{issued}.....done.\nCreated queued_resource [{name}].\n")

    def queued_resources_delete(self, role, names, flags, key):
        fault = self.fault(key, acts=True)
        if fault and fault[0] == "refused":
            return fault[1]
        found = self.resources.get(names[0])
        if found is None:
            return self.missing(f"queuedResources/{names[0]}")
        self.check_ours(role, found, "delete")
        self.check_unharmed(role, found, "delete")
        dice = self.draw("delete")
        issued = ISSUED.format("Delete", found.name)
        if self.stubborn:
            self.stubborn -= 1
            error = '{\n  "code": 13,\n  "message": "an internal error has occurred"\n}'
            return 1, "", f"{issued}.....failed.\nERROR: (gcloud.compute.tpus.queued-resources.delete) {error}\n"
        if dice.random() < 0.3:
            self.take_away(found, "DELETING", *(["DELETING"] * dice.choice([0, 2])), "GONE")
        else:
            del self.resources[found.name]
        if fault and dice.random() < 0.3:
            return self.missing(f"queuedResources/{found.name}")
        return fault[1] if fault else (0, "", f"{issued}.....done.\nDeleted queued_resource [{found.name}].\n")

    def node(self, name: str) -> Resource | None:
        there = (found for found in self.resources.values() if found.state == "ACTIVE" and name in found.nodes)
        return next(there, None)

    def tpu_vm_list(self, role, names, flags, key):
        if fault := self.fault(key):
            return fault[1]
        active = (found for found in self.resources.values() if found.state == "ACTIVE")
        return 0, "".join(f"{node},READY\n" for found in active for node in found.nodes), ""

    def tpu_vm_describe(self, role, names, flags, key):
        if fault := self.fault(key):
            return fault[1] if fault[0] != "empty" else (0, "0\n", "")
        return (0, f"{self.hosts}\n", "") if self.node(names[0]) else self.missing(f"nodes/{names[0]}")

    # Workers

    def check_ours(self, role: str, found: Resource, what: str) -> None:
        if found.by != "us":
            self.violation(f"{role} {what}: a machine of others")

    def check_unharmed(self, role: str, found: Resource, what: str) -> None:
        permitted = (
            self.asked_to_stop or role in ("stop", "delete", "run") or (self.silent_rounds >= 2 and self.is_silent)
        )
        if found.is_healthy() and not permitted:
            self.violation(f"{role} {what}: a healthy run")

    def reach(self, name: str, flags: dict, key: str):
        """Returns the resource, the worker, and the fault of the connection: None, or a value as from fault()."""
        found = self.node(name.partition(":")[0])
        worker = found and found.workers[name.partition(":")[0], int(flags["--worker"])]
        if worker and worker.silent:
            said = self.draw(key).choice([LATE, 255])
            fault = "refused", (said, "", "" if said == LATE else self.broken(255, self.draw(key).choice(SILENT)))
        else:
            fault = self.fault(key, acts=True)
            if fault and self.tick not in self.outage:
                said = self.draw(key).choice([LATE, 255, 255, 0, 1])
                if said in (LATE, 255):
                    why = self.draw(key).choice(SILENT + BROKEN)
                    fault = fault[0], (said, "", "" if said == LATE else self.broken(255, why))
                elif said == 0:  # the output is lost, but the exit code is 0
                    fault = "lost", (0, "", "")
        return found, worker, fault

    def broken(self, code: int, why: str) -> str:
        error = f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [{code}]."
        return f"SSH: Attempting to connect to worker 0...\n{why}\n{error}\n"

    def tpu_vm_scp(self, role, names, flags, key):
        if flags["--worker"] == "all":
            flags["--worker"] = "0"
        found, worker, fault = self.reach(names[-1], flags, key)
        if worker is None:
            return self.missing(f"nodes/{names[-1].partition(':')[0]}")
        self.check_ours(role, found, "scp")
        return fault[1] if fault else (0, "", "SCP: Attempting to connect to worker 0...\n")

    def tpu_vm_ssh(self, role, names, flags, key):
        words = shlex.split(flags["--command"])
        found, worker, fault = self.reach(names[0], flags, key + self.told(words)[0])
        if worker is None:
            return self.missing(f"nodes/{names[0]}")

        def act():
            return self.work(role, found, worker, words)

        if role == "babysit" and self.told(words)[0] == "status" and fault:
            self.is_silent |= fault[1][0] == LATE or any(why in fault[1][2] for why in SILENT)
        if fault and fault[0] == "refused":
            return fault[1]
        if fault and fault[1][0] == LATE and self.draw(key).random() < 0.5:
            worker.late.append(act)
            return fault[1]
        if "meshlm-busy" in flags["--command"]:  # waits for calls that are still in progress on the worker
            while worker.late:
                worker.late.pop(0)()
        code, out = act()
        while worker.late:
            worker.late.pop(0)()
        if fault:
            return fault[1]
        if role == "babysit" and self.told(words)[0] == "status":
            self.heard(found, names[0], int(flags["--worker"]))
        return code, out, "SSH: Attempting to connect to worker 0...\n"

    def heard(self, found: Resource, node: str, worker: int) -> None:
        self.answered.add((node, worker))
        if self.answered >= set(found.workers):
            self.silent_rounds = 0

    @staticmethod
    def told(words: list[str]) -> list[str]:
        """The verb and arguments with which worker.sh is called; an empty verb if worker.sh is not called."""
        for i, word in enumerate(words[1:], 1):
            if word in VERBS and (words[i - 1].endswith("worker.sh") or words[i - 1] == "worker"):
                return words[i:]
        return ["setup"] if any("worker.sh setup" in word for word in words) else [""]

    def work(self, role: str, found: Resource, worker: Worker, words: list[str]) -> tuple[int, str]:
        verb, *told = self.told(words)
        if worker not in found.workers.values():  # the machine is already gone
            return 255, ""
        if verb in ("setup", "start", "stop"):
            self.check_ours(role, found, verb)
        if not worker.is_set_up and "[ -e meshlm/launch/tpu/worker.sh ]" in " ".join(words):
            return 0, "none 0\n"
        if not worker.is_set_up and verb in ("start", "stop", "log", "status"):
            return 127, "bash: line 1: meshlm/launch/tpu/worker.sh: No such file or directory\n"
        if verb == "setup" and worker.running and any("a command runs here" in word for word in words):
            return 2, "a command runs here, which setup would end; run launch/tpu/stop.sh first\n"
        if verb == "setup":
            self.check_unharmed(role, found, verb)
            self.end(found, [worker], 42)
            worker.is_set_up, worker.mounted, worker.told, worker.code = True, True, None, None
            return 0, "python 3.12.3 jax 0.10.2 devices 4 of 16\n"
        if verb == "start":
            return self.start(role, found, worker, told, next((word for word in words if "MESHLM_CALL=" in word), ""))
        if verb == "stop":
            self.check_unharmed(role, found, verb)
            self.end(found, [worker], 42)
            return 0, ""
        if verb == "status":
            return 0, self.status(worker, told)
        return 0, "step 4,010  loss 2.31  12,345 tokens/s\n" if verb == "log" else ""

    def start(self, role: str, found: Resource, worker: Worker, told: list[str], call: str) -> tuple[int, str]:
        if worker.running and call and worker.call == call:
            return 0, self.status(worker, [])
        if found.is_healthy():
            if worker.told == told and role == "babysit":
                self.violation("second start of a healthy run")
            found.epoch += 1
        if not worker.mounted and told[: 2 if len(told) > len(COMMAND) else 0] != ["b", ""]:
            self.violation("a run that was started without its mounts")
        worker.mounted, worker.told, worker.call, worker.running, worker.code = True, told, call, True, None
        worker.epoch = found.epoch
        return 0, f"running {self.step}\n"

    def status(self, worker: Worker, asked: list[str]) -> str:
        step = self.step if worker.mounted else 0
        if worker.told is None:
            return "none 0\n"
        if asked and asked != worker.told:
            return "other 0\n" if worker.running else "none 0\n"
        if worker.running:
            return f"running {step}\n"
        return f"exited {137 if worker.code is None else worker.code} {step}\n"


class Server(socketserver.ThreadingTCPServer):
    """Passes each call of tests/system/fakes/histories.sh on to the world that the call names."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.worlds: dict[str, World] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data = b""
        while data.count(b"\0") < (int(data.partition(b"\0")[0]) + 1 if b"\0" in data else 1):
            if not (more := self.request.recv(65536)):
                return
            data += more
        _, name, role, *argv = data.decode().split("\0")[:-1]
        world = self.server.worlds.get(name)
        code, out, err = world.answer(role, argv) if world else (1, "", "ERROR: this history is over\n")
        with socket.socket(fileno=socket.dup(self.request.fileno())) as connection:
            connection.sendall("".join(f"{part}\0" for part in (code, out, err)).encode())
