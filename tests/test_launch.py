"""The launch scripts, with stand-ins for every program that they call, and the options that docs/pods.md names."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from documents import mentions, offered

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.iterdir())
TEXTS = [*SCRIPTS, ROOT / "docs" / "pods.md"]
HARD = [
    "beit_base_pt1k",
    "--data",
    "/mnt/my data",
    "--out",
    "/mnt/it's $HOME",
    "--init",
    'a "b" *',
    "--optim.lr",
    "1e-3",
]
GOES_ON, ENDS = (75, 10, 9, 134), (0, 1, 2, 8)

TPU = {"PROJECT": "p", "ZONE": "z", "NAME": "n", "ACCELERATOR": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite",
       "REPOSITORY": "https://host/a b.git", "REVISION": "v1", "POLL": "0", "PAUSE": "0"}  # fmt: skip
GKE = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "WORKLOAD": "w", "TPU_TYPE": "v6e-16", "IMAGE": "registry/image:1"}
SLURM = {"SLURM_JOB_ID": "7", "PAUSE": "0"}
SOME_CODE = 'read -r code rest < "$FAKES/codes"; echo "$rest" > "$FAKES/codes"'  # the next one

# What a stand-in does: it records its arguments, one record in one write, and then what the test wants of it.
STAND_IN = """#!/bin/bash
record="${0##*/}"
for argument in "$@"; do record+=$'\\x1f'"$argument"; done
printf '%s\\x1e' "$record" >> "$FAKES/calls"
if [ -f "$FAKES/${0##*/}.do" ]; then . "$FAKES/${0##*/}.do"; fi
"""


class Fakes:
    """Programs on PATH that record how they were called."""

    def __init__(self, directory: Path):
        self.directory, self.programs = directory, directory / "bin"
        self.programs.mkdir()
        # On a TPU VM the program lies in the home directory.
        for place in (self.programs, directory / "beit-jax" / ".venv" / "bin"):
            place.mkdir(parents=True, exist_ok=True)
            self.add("beit-jax", place)

    def add(self, name: str, place: Path | None = None, do: str = "") -> None:
        program = (place or self.programs) / name
        program.write_text(STAND_IN)
        program.chmod(0o755)
        if do:
            (self.directory / f"{name}.do").write_text(do)

    def environment(self, values: dict[str, str]) -> dict[str, str]:
        path = f"{self.programs}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.directory), "FAKES": str(self.directory), **values}

    def run(self, script: str, *arguments: str, **values: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(LAUNCH / script), *arguments]
        return subprocess.run(
            command, env=self.environment(values), cwd=self.directory, capture_output=True, text=True, timeout=60
        )

    def calls(self, *names: str) -> list[list[str]]:
        """Of these programs, or of all."""
        file = self.directory / "calls"
        records = file.read_text().split("\x1e")[:-1] if file.exists() else []
        calls = [record.split("\x1f") for record in records]
        return [call for call in calls if not names or call[0] in names]

    def codes(self, *codes: int) -> None:
        """Exit codes of `beit-jax`, call by call."""
        (self.directory / "codes").write_text(" ".join(map(str, codes)))
        (self.directory / "beit-jax.do").write_text(f'{SOME_CODE}\nexit "${{code:-0}}"\n')


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    found = Fakes(tmp_path)
    # gcloud runs the command on as many hosts as HOSTS says, one after the other, and returns 0 as sh does.
    found.add(
        "gcloud",
        do="""
case "$*" in
*" describe "*)
    read -r state rest < "$FAKES/states" 2>/dev/null
    echo "$rest" > "$FAKES/states"; echo "${state:-ACTIVE}" ;;
*" ssh "*)
    for argument in "$@"; do case $argument in --command=*) command=${argument#*=} ;; esac; done
    for ((host = 0; host < ${HOSTS:-1}; host++)); do bash -c "$command" || exit $?; done ;;
esac
""",
    )
    found.add("xpk")
    found.add("scontrol")
    for name in ("git", "uv", "gcsfuse", "sudo"):
        found.add(name)
    found.add("mountpoint", do="exit 1")
    found.add("mount.nfs")
    found.add("ssh", do='bash -c "${!#}"; exit $?')
    # srun starts TASKS tasks, names every code that is not 0, and returns the highest.
    found.add(
        "srun",
        do="""
shift; highest=0
for ((task = 0; task < ${TASKS:-1}; task++)); do
    "$@"; code=$?
    [ "$code" -eq 0 ] || echo "srun: error: node$task: task $task: Exited with exit code $code" >&2
    [ "$code" -le "$highest" ] || highest=$code
done
exit "$highest"
""",
    )
    return found


def subcommands(fakes: Fakes) -> list[str]:
    """What gcloud was asked for, call by call."""
    assert all(call[:4] == ["gcloud", "compute", "tpus", "queued-resources"] for call in fakes.calls("gcloud"))
    return [call[4] for call in fakes.calls("gcloud")]


# --- Every script -----------------------------------------------------------------------------------------------------


def test_scripts_are_there() -> None:
    assert {path.name for path in SCRIPTS} == {"tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch", "by_hand.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_xpk.sh", "by_hand.sh"])
def test_help_says_how_to_use_it(fakes: Fakes, script: str) -> None:
    shown = fakes.run(script, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: launch/{script}")
    assert fakes.run(script).stderr == shown.stdout
    assert fakes.run(script).returncode == 2 and fakes.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments", "given", "missing"),
    [
        *[("tpu_vm.sh", ["create"], TPU, name) for name in ("PROJECT", "ZONE", "NAME", "ACCELERATOR", "RUNTIME")],
        *[("tpu_vm.sh", ["setup"], TPU, name) for name in ("REPOSITORY", "REVISION")],
        *[
            ("tpu_vm.sh", ["resume", "dvae"], TPU, name)
            for name in ("ACCELERATOR", "RUNTIME", "REPOSITORY", "REVISION")
        ],
        *[("tpu_vm.sh", [command], TPU, "NAME") for command in ("run", "ssh", "stop", "delete")],
        *[("gke_xpk.sh", ["run", "dvae"], GKE, name) for name in GKE],
        ("gke_xpk.sh", ["delete"], GKE, "WORKLOAD"),
    ],
)
def test_what_is_missing_is_one_line(
    fakes: Fakes, script: str, arguments: list[str], given: dict[str, str], missing: str
) -> None:
    ended = fakes.run(script, *arguments, **{name: value for name, value in given.items() if name != missing})
    assert ended.returncode == 2 and fakes.calls() == []
    assert ended.stderr == f"{script}: {missing} is not set; --help says what it is\n"


@pytest.mark.parametrize(
    ("script", "arguments", "given"),
    [
        ("tpu_vm.sh", ["run"], TPU),
        ("tpu_vm.sh", ["resume"], TPU),
        ("tpu_vm.sh", ["ssh"], TPU),
        ("tpu_vm.sh", ["create-all"], TPU),
        ("gke_xpk.sh", ["run"], GKE),
        ("gke_xpk.sh", ["stop"], GKE),
        ("slurm.sbatch", [], SLURM),
        ("slurm.sbatch", ["dvae"], {}),
        ("by_hand.sh", ["2"], {}),
    ],
)
def test_wrong_arguments_are_one_line(fakes: Fakes, script: str, arguments: list[str], given: dict[str, str]) -> None:
    ended = fakes.run(script, *arguments, **given)
    assert ended.returncode == 2 and fakes.calls() == []
    assert ended.stderr.startswith(f"{script}: ") and ended.stderr.count("\n") == 1


# --- The loop: the same for every way to start a run ------------------------------------------------------------------

LOOPS = {
    "tpu_vm.sh": (["resume"], TPU, "HOSTS"),
    "slurm.sbatch": ([], SLURM, "TASKS"),
    "by_hand.sh": (["1"], {"PAUSE": "0"}, ""),
}


def attempts(fakes: Fakes) -> int:
    return len(fakes.calls("beit-jax"))


@pytest.mark.parametrize("script", LOOPS)
@pytest.mark.parametrize("code", GOES_ON)
def test_starts_again(fakes: Fakes, script: str, code: int) -> None:
    arguments, given, _ = LOOPS[script]
    fakes.codes(code, code, 0)
    ended = fakes.run(script, *arguments, "dvae", **given)
    if script == "slurm.sbatch" and code == 75:  # in the queue, not within an allocation that is about to end
        assert ended.returncode == 75 and attempts(fakes) == 1
        assert fakes.calls("scontrol") == [["scontrol", "requeue", "7"]]
        return
    assert ended.returncode == 0 and attempts(fakes) == 3, ended.stderr
    assert ended.stderr.count(f"{script}: exit code {code}; starting again") == 2
    assert fakes.calls("scontrol") == []


@pytest.mark.parametrize("script", LOOPS)
@pytest.mark.parametrize("code", ENDS)
def test_does_not_start_again(fakes: Fakes, script: str, code: int) -> None:
    arguments, given, _ = LOOPS[script]
    fakes.codes(code, 0)
    assert fakes.run(script, *arguments, "dvae", **given).returncode == code
    assert attempts(fakes) == 1 and fakes.calls("scontrol") == []


@pytest.mark.parametrize("script", LOOPS)
def test_gives_up_after_so_many_restarts(fakes: Fakes, script: str) -> None:
    arguments, given, _ = LOOPS[script]
    fakes.codes(10, 10, 10, 10)
    ended = fakes.run(script, *arguments, "dvae", **given, RESTARTS="2")
    assert ended.returncode == 10 and attempts(fakes) == 3


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sbatch"])
@pytest.mark.parametrize("codes", [(10, 2, 10), (2, 10, 10), (134, 10, 2)])
def test_the_process_that_failed_counts_not_those_it_took_along(
    fakes: Fakes, script: str, codes: tuple[int, ...]
) -> None:
    arguments, given, count = LOOPS[script]
    fakes.codes(*codes)
    assert fakes.run(script, *arguments, "dvae", **given, **{count: "3"}).returncode == 2
    assert attempts(fakes) == 3


def test_by_hand_the_process_that_failed_counts(fakes: Fakes) -> None:
    (fakes.directory / "beit-jax.do").write_text('[ "${!#}" = 1 ] && exit 2; exit 10')
    assert fakes.run("by_hand.sh", "3", "dvae", PAUSE="0").returncode == 2
    assert attempts(fakes) == 3


# --- TPU VMs ----------------------------------------------------------------------------------------------------------

WHERE = ["--project=p", "--zone=z"]


@pytest.mark.parametrize(
    ("more", "flags"),
    [
        ({}, ["--node-id=n"]),
        ({"SPOT": "yes"}, ["--node-id=n", "--spot"]),
        ({"SLICES": "2"}, ["--node-count=2", "--node-prefix=n"]),
        ({"CREATE_FLAGS": "--network=a --subnetwork=b"}, ["--network=a", "--subnetwork=b", "--node-id=n"]),
    ],
)
def test_create_asks_and_waits(fakes: Fakes, more: dict[str, str], flags: list[str]) -> None:
    (fakes.directory / "states").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert fakes.run("tpu_vm.sh", "create", **TPU, **more).returncode == 0
    created, *looks = [call[4:] for call in fakes.calls("gcloud")]
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert created == ["create", "n", *kind, *flags, *WHERE]
    assert looks == [["describe", "n", "--format=value(state.state)", *WHERE]] * 3


def test_create_says_when_there_will_be_none(fakes: Fakes) -> None:
    (fakes.directory / "states").write_text("FAILED")
    ended = fakes.run("tpu_vm.sh", "create", **TPU)
    assert ended.returncode == 2 and ended.stderr.startswith("tpu_vm.sh: n is FAILED; ")


def test_setup_installs_and_mounts_on_every_host(fakes: Fakes) -> None:
    more = {"BUCKET": "my-bucket", "NFS": "10.0.0.2:/share", "DATA_DIR": "/mnt/my data"}
    ended = fakes.run("tpu_vm.sh", "setup", **TPU, **more, HOSTS="2")
    assert ended.returncode == 0, ended.stderr
    (ssh,) = (call[4:] for call in fakes.calls("gcloud"))
    assert ssh[:5] == ["ssh", "n", "--node=all", "--worker=all", "--batch-size=all"] and ssh[-2:] == WHERE
    done = fakes.calls("git", "uv", "gcsfuse", "sudo")
    first, second = done[: len(done) // 2], done[len(done) // 2 :]
    assert second == [call for call in first if call[:2] != ["git", "clone"]] or second == first
    install = ["--python", ".venv/bin/python", "-c", "constraints.txt", "-e", ".[train]", "jax[tpu]"]
    cache = ["--metadata-cache-ttl-secs=-1", "--stat-cache-max-size-mb=-1"]
    user = f"{os.getuid()}:{os.getgid()}"
    assert [call for call in first if call[:2] != ["git", "clone"]] == [
        ["git", "fetch", "--quiet", "--tags", "origin"],
        ["git", "checkout", "--quiet", "v1"],
        *([] if (fakes.directory / "beit-jax/.venv/bin/python").exists() else
          [["uv", "venv", "--quiet", "--python", "3.12", ".venv"]]),
        ["uv", "pip", "install", "--quiet", *install],
        ["sudo", "mkdir", "-p", "/mnt/my data"],
        ["sudo", "chown", user, "/mnt/my data"],
        ["gcsfuse", "-o", "ro", "--implicit-dirs", *cache, "my-bucket", "/mnt/my data"],
        ["sudo", "mkdir", "-p", "/mnt/runs"],
        ["sudo", "mount", "-t", "nfs", "-o", "hard,lookupcache=positive", "10.0.0.2:/share", "/mnt/runs"],
    ]  # fmt: skip


def test_setup_clones_what_is_not_there(fakes: Fakes) -> None:
    shutil.rmtree(fakes.directory / "beit-jax")
    fakes.add("git", do=f"[ $1 != clone ] || mkdir -p {shlex.quote(str(fakes.directory / 'beit-jax'))}")
    assert fakes.run("tpu_vm.sh", "setup", **TPU).returncode == 0
    assert fakes.calls("git")[0] == ["git", "clone", "--quiet", "https://host/a b.git", "beit-jax"]
    assert fakes.calls("gcsfuse", "sudo") == []


def test_setup_that_fails_on_a_host_fails(fakes: Fakes) -> None:
    fakes.add("uv", do="exit 1")
    assert fakes.run("tpu_vm.sh", "setup", **TPU).returncode == 1


def test_run_passes_arguments_as_they_are(fakes: Fakes) -> None:
    ended = fakes.run("tpu_vm.sh", "run", *HARD, **TPU, HOSTS="2")
    assert ended.returncode == 0
    assert fakes.calls("beit-jax") == [["beit-jax", "train", *HARD]] * 2
    assert subcommands(fakes) == ["ssh"]  # all hosts by one command


def test_a_host_that_cannot_be_reached_is_lost(fakes: Fakes) -> None:
    fakes.add("gcloud", do='case "$*" in *" describe "*) echo ACTIVE ;; *) exit 255 ;; esac')
    assert fakes.run("tpu_vm.sh", "run", "dvae", **TPU).returncode == 255


def test_resume_sets_up_again_before_it_starts_again(fakes: Fakes) -> None:
    fakes.codes(10, 0)
    assert fakes.run("tpu_vm.sh", "resume", "dvae", **TPU).returncode == 0
    assert subcommands(fakes) == ["ssh", "describe", "describe", "ssh", "ssh"]
    assert ["uv" in call for call in fakes.calls("beit-jax", "uv") if call[:2] != ["uv", "venv"]] == [
        False,
        True,
        False,
    ]


def test_resume_requests_vms_that_were_taken_away(fakes: Fakes) -> None:
    fakes.codes(75, 0)
    (fakes.directory / "states").write_text("SUSPENDED WAITING_FOR_RESOURCES ACTIVE")
    assert fakes.run("tpu_vm.sh", "resume", "dvae", **TPU, SPOT="yes").returncode == 0
    expected = ["ssh", "describe", "delete", "create", "describe", "describe", "ssh", "ssh"]
    assert subcommands(fakes) == expected
    assert fakes.calls("gcloud")[2][4:] == ["delete", "n", "--force", "--quiet", *WHERE]
    assert "--spot" in fakes.calls("gcloud")[3]


def test_resume_deletes_nothing_that_it_cannot_see(fakes: Fakes) -> None:
    fakes.codes(10, 0)
    command = "${argument#*=}"
    fakes.add(
        "gcloud",
        do='case "$*" in *" describe "*) exit 1 ;; esac\n'
        f'for argument in "$@"; do case $argument in --command=*) bash -c "{command}" ;; esac; done',
    )
    ended = fakes.run("tpu_vm.sh", "resume", "dvae", **TPU)
    assert ended.returncode == 2 and ended.stderr.endswith("tpu_vm.sh: the state of n cannot be read\n")
    assert subcommands(fakes) == ["ssh", "describe"]


@pytest.mark.parametrize("arguments", [["create"], ["setup"], ["run", *HARD], ["ssh", "df -h"], ["stop"], ["delete"]])
def test_dry_run_prints_what_would_be_called(fakes: Fakes, arguments: list[str]) -> None:
    printed = fakes.run("tpu_vm.sh", "--dry-run", *arguments, **TPU).stdout
    assert fakes.calls() == []
    fakes.add("gcloud", do='case "$*" in *" describe "*) echo ACTIVE ;; esac')
    fakes.run("tpu_vm.sh", *arguments, **TPU)
    shown = subprocess.run(
        ["bash", "-c", printed], env=fakes.environment({"FAKES": str(fakes.directory)}), capture_output=True
    )
    assert shown.returncode == 0
    calls = fakes.calls("gcloud")
    assert len(calls) > 0 and calls[: len(calls) // 2] == calls[len(calls) // 2 :]


def test_stop_signals_the_program_alone(fakes: Fakes) -> None:
    """Neither the shell around it nor the one that looks for it."""
    fakes.run("tpu_vm.sh", "--dry-run", "stop", **TPU)
    line = fakes.run("tpu_vm.sh", "--dry-run", "stop", **TPU).stdout
    (command,) = (word.partition("=")[2] for word in shlex.split(line) if word.startswith("--command="))
    pattern = shlex.split(command)[-1]
    assert re.search(pattern, "/home/u/beit-jax/.venv/bin/python /home/u/beit-jax/.venv/bin/beit-jax train dvae")
    assert not re.search(
        pattern, "bash -c trap : TERM; code=0; $HOME/beit-jax/.venv/bin/beit-jax train dvae || code=$?"
    )
    assert not re.search(pattern, f"bash -c {command}")


# --- GKE --------------------------------------------------------------------------------------------------------------


def test_gke_run(fakes: Fakes) -> None:
    assert fakes.run("gke_xpk.sh", "run", *HARD, **GKE, SLICES="2", STORAGES="data runs").returncode == 0
    (call,) = fakes.calls("xpk")
    assert call[:3] == ["xpk", "workload", "create"]
    where = {"--project=p", "--zone=z", "--cluster=c", "--workload=w"}
    what = {
        "--tpu-type=v6e-16",
        "--num-slices=2",
        "--docker-image=registry/image:1",
        "--storage=data",
        "--storage=runs",
    }
    again = {"--max-restarts=100", "--restart-on-exit-codes=9,10,75", "--termination-grace-period-seconds=120"}
    assert set(call[3:-1]) == where | what | again
    option, _, command = call[-1].partition("=")
    assert option == "--command" and "\n" not in command  # it becomes a line of YAML
    subprocess.run(["bash", "-c", f"({command})"], env=fakes.environment({}), check=True)
    assert fakes.calls("beit-jax") == [["beit-jax", "train", *HARD]]


def test_gke_delete_and_dry_run(fakes: Fakes) -> None:
    printed = fakes.run("gke_xpk.sh", "--dry-run", "delete", **GKE).stdout
    assert fakes.calls() == []
    fakes.run("gke_xpk.sh", "delete", **GKE)
    assert fakes.calls() == [shlex.split(printed)]
    assert fakes.calls()[0][1:3] == ["workload", "delete"]


# --- SLURM ------------------------------------------------------------------------------------------------------------


def test_slurm_run(fakes: Fakes) -> None:
    assert fakes.run("slurm.sbatch", *HARD, **SLURM, TASKS="2").returncode == 0
    assert fakes.calls("srun") == [["srun", "--kill-on-bad-exit=0", "beit-jax", "train", *HARD]]
    assert fakes.calls("beit-jax") == [["beit-jax", "train", *HARD]] * 2


def test_slurm_lets_both_outputs_through_and_cores_to_srun(fakes: Fakes) -> None:
    (fakes.directory / "beit-jax.do").write_text('echo "out $SRUN_CPUS_PER_TASK"; echo err >&2')
    ended = fakes.run("slurm.sbatch", "dvae", **SLURM, SLURM_CPUS_PER_TASK="12")
    assert ended.stdout == "out 12\n" and ended.stderr == "err\n"


def test_slurm_queues_no_more_than_so_often(fakes: Fakes) -> None:
    fakes.codes(75)
    assert fakes.run("slurm.sbatch", "dvae", **SLURM, RESTARTS="3", SLURM_RESTART_COUNT="3").returncode == 75
    assert fakes.calls("scontrol") == []


# --- By hand ----------------------------------------------------------------------------------------------------------


def hosts_options(address: str, count: int, number: int) -> list[str]:
    place = ["--hosts.processes", str(count), "--hosts.process", str(number)]
    return ["--hosts.coordinator", address, *place]


def test_by_hand_on_this_machine(fakes: Fakes) -> None:
    assert fakes.run("by_hand.sh", "2", *HARD).returncode == 0
    expected = [["beit-jax", "train", *HARD, *hosts_options("localhost:8476", 2, i)] for i in range(2)]
    assert sorted(fakes.calls()) == expected


def test_by_hand_by_ssh(fakes: Fakes) -> None:
    ended = fakes.run("by_hand.sh", "me@a,b", *HARD, PORT="99", BEIT_JAX="beit-jax")
    assert ended.returncode == 0, ended.stderr
    assert sorted(call[1:4] for call in fakes.calls("ssh")) == [["-o", "BatchMode=yes", host] for host in ("b", "me@a")]
    expected = [["beit-jax", "train", *HARD, *hosts_options("a:99", 2, i)] for i in range(2)]
    assert sorted(fakes.calls("beit-jax")) == expected


def test_by_hand_ends_where_ssh_fails(fakes: Fakes) -> None:
    fakes.add("ssh", do="exit 255")
    assert fakes.run("by_hand.sh", "a,b", "dvae", PAUSE="0").returncode == 255
    assert len(fakes.calls("ssh")) == 2


def test_by_hand_a_signal_saves_and_ends(fakes: Fakes) -> None:
    """Process 0 gets it, as one is enough; the script waits for all, and does not start again."""
    (fakes.directory / "beit-jax.do").write_text(
        'if [ "${!#}" = 0 ]; then trap \'touch "$FAKES/told"; exit 75\' TERM; touch "$FAKES/ready"; fi\n'
        'for ((i = 0; i < 1000; i++)); do [ ! -e "$FAKES/told" ] || exit 75; sleep 0.01; done; exit 1\n'
    )
    command = ["bash", str(LAUNCH / "by_hand.sh"), "2", "dvae"]
    with subprocess.Popen(command, env=fakes.environment({}), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not (fakes.directory / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert attempts(fakes) == 2


# --- Options that are named -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_options_that_are_named_exist(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    known = {name: offered(capsys, name, "digits_finetune") for name in ("train", "aot")} | {
        name: offered(capsys, name) for name in ("prepare", "evaluate")
    }
    assert {"--data", "--run.mesh"} <= known["train"]
    unknown = set(re.findall(r"(?<!\S)`?(--[a-z]\w*\.[a-z][\w-]*)", content)) - known["train"]
    for name, options in mentions(content):
        unknown |= set(options) - known.get(name, set(options))
    assert unknown == set()


def test_the_page_names_every_script_and_exit_code() -> None:
    page = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    assert all(f"launch/{script.name}" in page for script in SCRIPTS)
    table = {int(code) for code in re.findall(r"^\| (\d+)[ ,|]", page, re.MULTILINE)}
    assert {0, 1, 2, 6, 7, 8, 9, 10, 75, 134} <= table
    assert sys.platform != "linux" or str(Path.home()) + "/" not in page
