"""The real SkyPilot up to its call of the cloud: parses `sky WORDS...` and prints the job as JSON.

A Python that has skypilot runs this. The output has the script that SkyPilot would run on the second of two hosts, and
whether the job would be started again after each list of exit codes in $CODES.
"""

import json
import os
import sys

from sky.backends import task_codegen
from sky.client.cli import command
from sky.jobs import recovery_strategy
from sky.skylet import log_lib


class Launched(Exception):
    pass


def launch(dag, *args, **kwargs):
    raise Launched(dag)


def script(task, rank: int) -> str:
    place = {
        "SKYPILOT_NODE_RANK": rank,
        "SKYPILOT_NUM_NODES": task.num_nodes,
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    bash = task_codegen.TaskCodeGen.build_task_bash_script(task.run, env_prefix="unset RAY_RAYLET_PID")
    return log_lib.make_task_bash_script(bash, env_vars={**place, **task.envs})


def starts_again(resources, codes: list[int]) -> bool:
    job = recovery_strategy.FailoverStrategyExecutor.__new__(recovery_strategy.FailoverStrategyExecutor)
    job.recover_on_exit_codes = resources.job_recovery["recover_on_exit_codes"]
    job.max_restarts_on_errors = resources.job_recovery["max_restarts_on_errors"]
    job.restart_cnt_on_failure = 0
    return job.should_restart_on_failure(codes)


command.managed_jobs.launch = launch
try:
    command.cli.main(sys.argv[1:], standalone_mode=False)
except Launched as launched:
    dag = launched.args[0]
(task,) = dag.tasks
(resources,) = task.resources
answer = {
    "name": dag.name,
    "resources": resources.to_yaml_config(),
    "nodes": task.num_nodes,
    "mounts": {path: [storage.source, storage.mode.value] for path, storage in task.storage_mounts.items()},
    "envs": task.envs,
    "setup": task.setup,
    "script": script(task, rank=1),
    "starts_again": [starts_again(resources, codes) for codes in json.loads(os.environ["CODES"])],
}
print(json.dumps(answer))
