"""Processes watching each other, here as objects with a store in memory; rounds of the watch are taken by hand."""

import json
import queue
import random
import sys
import threading
import types
from typing import NoReturn

import jax
import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.train.distributed import peers as module
from beit_jax.train.distributed.peers import HUNG, LOST, Peers, Position, coordination_store


class Memory:
    """A store for processes that are objects of one."""

    def __init__(self) -> None:
        self._entries: dict[str, str] = {}
        self._lock = threading.Lock()
        self.gone = False

    def set(self, key: str, value: str) -> None:
        self._check()
        with self._lock:
            self._entries[key] = value

    def under(self, prefix: str) -> dict[str, str]:
        self._check()
        with self._lock:
            return {key[len(prefix) :]: value for key, value in self._entries.items() if key.startswith(prefix)}

    def _check(self) -> None:
        if self.gone:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect\nand more")


class Ended(BaseException):
    """Stands in for the end of a process."""


def ends(code: int) -> NoReturn:
    raise Ended(code)


@pytest.fixture
def store() -> Memory:
    return Memory()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAREWELL", 0.1)


def of(store: Memory, count: int, silence: float = 20.0) -> list[Peers]:
    return [Peers(store, index, count, silence=silence, host=f"host-{index}", end=ends) for index in range(count)]


def rounds(peer: Peers, count: int) -> None:
    for _ in range(count):
        peer.look()


def last_words(capfd: pytest.CaptureFixture[str]) -> str:
    return capfd.readouterr().err.splitlines()[-1]


# --- Lost, failed, hung -----------------------------------------------------------------------------------------------


def test_a_silent_process_is_lost_after_the_stated_time_and_named_to_all(
    store: Memory, capfd: pytest.CaptureFixture[str]
) -> None:
    """With 20 s of patience and a round a second: not after 19 rounds without a new beat, but after 20."""
    first, silent, third = of(store, 3)
    first.saved = third.saved = lambda: 1200
    silent.look()
    third.look()
    first.look()
    for _ in range(19):
        first.look()
        third.look()
    with pytest.raises(Ended, match=str(LOST)):
        first.look()
    expected = (
        "error: process 1 on host-1 gave no sign of life for 20 s: killed, or its machine or network is gone; "
        "step 1,200 is saved, the same command goes on from it"
    )
    assert last_words(capfd) == expected
    with pytest.raises(Ended, match=str(LOST)):
        third.look()
    assert last_words(capfd) == expected


def test_who_beats_or_has_ended_well_is_not_lost(store: Memory) -> None:
    first, living, done = of(store, 3)
    with done:
        done.look()
    for _ in range(100):
        living.look()
        first.look()


def test_time_that_the_watching_process_slept_does_not_count(store: Memory) -> None:
    """Silence is counted in rounds, not by a clock: a suspended machine that wakes accuses nobody."""
    first, second = of(store, 2)
    second.look()
    rounds(first, 15)
    second.look()
    rounds(first, 15)


def test_a_failure_is_told_in_the_words_of_its_process(store: Memory, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = of(store, 2)
    second.fail("/data/x.array_record: damaged")
    with pytest.raises(Ended, match=str(LOST)):
        first.look()
    assert last_words(capfd) == (
        "error: process 1 on host-1 failed: /data/x.array_record: damaged; nothing was saved"
    )  # fmt: skip
    second.look()  # is on its way out, and goes its own way


def test_leaving_by_an_error_tells_it_and_leaving_well_does_not(store: Memory) -> None:
    first, second = of(store, 2)
    with pytest.raises(BeitJaxError), second:
        raise BeitJaxError("no such file")
    assert json.loads(store.under("end/")["1"])["why"] == "failed: no such file"
    with first:
        pass
    assert list(store.under("end/")) == ["1"]


def test_a_failed_collective_is_no_cause_while_another_may_be(store: Memory, capfd: pytest.CaptureFixture[str]) -> None:
    """The watch, still at work, finds the lost process and ends this one before its own error counts."""
    codes: list[int] = []
    first = Peers(store, 0, 2, silence=0.3, host="host-0", end=codes.append)
    Peers(store, 1, 2, host="host-1").look()
    with pytest.raises(jax.errors.JaxRuntimeError), first:
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed")
    assert codes == [LOST]
    assert "process 1 on host-1 gave no sign of life" in last_words(capfd)
    assert json.loads(store.under("end/")["1"])["kind"] == "lost"


def test_an_exhausted_memory_is_a_cause_at_once(store: Memory) -> None:
    (first, _) = of(store, 2, silence=1000.0)
    with pytest.raises(jax.errors.JaxRuntimeError), first:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 17 bytes")
    assert json.loads(store.under("end/")["0"])["why"].startswith("failed: JaxRuntimeError: RESOURCE_EXHAUSTED")


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        # It has done the fewest steps.
        ([Position(8, "step", 40), Position(7, "input", 35), Position(8, "input", 41)], [1]),
        # As many steps as all, but they wait in a step and it is elsewhere.
        ([Position(8, "step", 40), Position(8, "input", 39), Position(8, "step", 40)], [1]),
        # In an evaluation: fewer signs of progress.
        ([Position(8, "evaluation", 50), Position(8, "evaluation", 50), Position(8, "evaluation", 47)], [2]),
        ([Position(8, "input", 39), Position(8, "input", 39), Position(8, "step", 40)], [0, 1]),
    ],
)
def test_a_hang_names_whom_all_wait_for(
    store: Memory, capfd: pytest.CaptureFixture[str], places: list[Position], expected: list[int]
) -> None:
    all_of_them = of(store, 3)
    for peer, place in zip(all_of_them, places, strict=True):
        peer.where = lambda place=place: place
        peer.look()
    all_of_them[0].hung(0.5)
    named = {int(index): json.loads(text) for index, text in store.under("end/").items()}
    assert sorted(named) == expected
    for index, end in named.items():
        where = places[index]
        assert end["why"] == f"stands still in {where.phase} after step {where.step} for 0.5 minutes"
    with pytest.raises(Ended, match=str(HUNG)):
        all_of_them[2].look()
    said = capfd.readouterr().err
    assert "test_a_hang_names_whom_all_wait_for" in said, "the stacks of all threads"
    assert said.splitlines()[-1].startswith(f"error: process {expected[0]} on host-{expected[0]} stands still")


def test_where_all_stand_at_the_same_place_nobody_is_accused(store: Memory) -> None:
    first, second = of(store, 2)
    second.look()
    first.look()
    second.hung(30)
    assert json.loads(store.under("end/")["1"])["why"] == "and all others stand still in start for 30 minutes"


def test_without_the_store_the_leader_is_gone(store: Memory, capfd: pytest.CaptureFixture[str]) -> None:
    codes: queue.Queue[int] = queue.Queue()
    second = Peers(store, 1, 2, silence=0.1, host="host-1", end=codes.put)
    with pytest.raises(KeyError), second:
        store.gone = True
        assert codes.get(timeout=10) == LOST
        raise KeyError  # told to nobody, for there is nobody left
    assert "process 0 on the leading host cannot be reached (UNAVAILABLE: failed to connect)" in last_words(capfd)


# --- The last step ----------------------------------------------------------------------------------------------------


def test_alone_a_request_counts_at_once() -> None:
    with Peers() as alone:
        assert not alone.stops_after(3)
        alone.request("SIGTERM")
        assert alone.stops_after(4)
        alone.compare({"a": 1}, patience=0)
        alone.fail("nobody listens")
        alone.hung(1)


@pytest.mark.parametrize("seed", range(8))
def test_all_stop_after_the_same_step(store: Memory, seed: int) -> None:
    """Threads that wait for each other in every step, as collectives do; with some slow in their step or their watch,
    and a request at a random time."""
    count, rng = 4, random.Random(seed)
    together, stopped = threading.Barrier(count), dict[int, int]()
    begun = rng.randrange(5)
    all_of_them = of(store, count)

    def run(peer: Peers, pauses: random.Random) -> None:
        peer.begin(begun)
        for step in range(begun + 1, 10_000):
            together.wait(20)
            threading.Event().wait(pauses.random() / 200)
            if peer.stops_after(step):
                stopped[peer.index] = step
                return

    over = threading.Event()

    def watch(peer: Peers, pauses: random.Random) -> None:
        while not over.is_set():
            peer.look()
            threading.Event().wait(pauses.random() / 50)

    seeds = [random.Random(rng.random()) for _ in range(2 * count)]
    runs = [threading.Thread(target=run, args=(peer, seeds.pop())) for peer in all_of_them]
    watches = [threading.Thread(target=watch, args=(peer, seeds.pop())) for peer in all_of_them]
    for thread in runs + watches:
        thread.start()
    threading.Event().wait(rng.random() / 10)
    all_of_them[rng.randrange(count)].request("SIGTERM")
    for thread in runs:
        thread.join(30)
    over.set()
    for thread in watches:
        thread.join(30)
    assert len(stopped) == count and len(set(stopped.values())) == 1
    assert begun < min(stopped.values()) < 10_000 - 1


def test_who_said_where_it_is_waits_for_the_answer(store: Memory) -> None:
    first, second = of(store, 2)
    first.begin(5)
    second.begin(5)
    assert not first.stops_after(6)
    first.request("SIGTERM")
    first.look()
    answer: list[bool] = []
    waiting = threading.Thread(target=lambda: answer.append(first.stops_after(7)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "the second process has not been asked"
    second.look()
    first.look()
    waiting.join(10)
    assert answer == [True]  # 6 was the furthest: 7 is the last
    assert not second.stops_after(6) and second.stops_after(7)


# --- Facts ------------------------------------------------------------------------------------------------------------


def compared(store: Memory, facts: list[object], patience: float = 20.0) -> list[str | None]:
    """The error that each process raises when facts are compared; None: no error."""
    found: list[str | None] = [None] * len(facts)

    def one(peer: Peers) -> None:
        try:
            peer.compare(facts[peer.index], patience=patience)  # type: ignore[arg-type]
        except BeitJaxError as error:
            found[peer.index] = str(error)

    threads = [threading.Thread(target=one, args=(peer,)) for peer in of(store, len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_equal_facts_pass(store: Memory) -> None:
    assert compared(store, [{"a": (1, 2), "b": {"c": None}}] * 3) == [None] * 3


def test_a_difference_names_process_host_and_field(store: Memory) -> None:
    same = {"recipe": {"optim": {"lr": 0.001, "clip": 1.0}}, "code": "ab"}
    other = {"recipe": {"optim": {"lr": 0.002, "clip": 1.0}}, "code": "ab"}
    message = (
        "process 2 on host-2: recipe.optim.lr is 0.002, 0.001 in process 0; "
        "start the same command, code and data on every host"
    )
    assert compared(store, [same, same, other, same]) == [message, None, message, None]


def test_who_says_nothing_is_named(store: Memory) -> None:
    first = of(store, 3)[0]
    Peers(store, 1, 3, host="host-1")._say("facts", {"host": "host-1", "facts": {}})
    with pytest.raises(BeitJaxError, match=r"^process 2: nothing was heard for 0 s; look at its output$"):
        first.compare({}, patience=0.3)


# --- The store of JAX -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["jax._src.distributed", "global_state", "key_value_dir_get"])
def test_where_jax_offers_no_store_one_line_says_so(
    missing: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The module, its state or a method of its client is gone; each time the run goes on without a store."""
    client = types.SimpleNamespace(key_value_set=None, key_value_dir_get=None)
    private = types.SimpleNamespace(global_state=types.SimpleNamespace(client=client))
    if missing == "jax._src.distributed":
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delattr("jax._src.distributed")
    else:
        vars(client if missing in vars(client) else private).pop(missing)
        monkeypatch.setattr("jax._src.distributed", private)
    assert coordination_store() is None
    (line,) = capfd.readouterr().err.splitlines()
    assert jax.__version__ in line and missing.rpartition(".")[2] in line


def test_the_watch_ends_with_the_block(store: Memory) -> None:
    def watches() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "peers"]

    with of(store, 1)[0]:
        assert watches() == ["peers"]
    assert watches() == []
