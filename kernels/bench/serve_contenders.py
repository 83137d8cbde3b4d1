"""The servers of bench.serve: started at once, compared, loaded in turn, and looked into."""

import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from operator import sub
from pathlib import Path
from statistics import mean

from bench.random_weights import MEMORY_FRACTION, PLUGIN_NAME, write_entry_point, write_model
from bench.serve_load import Clocks, Load, inter_token_seconds, kv_tokens, measure, rpc, step_ms
from bench.serve_report import OURS

from vllm_dsv4_moe.commands.serving import Server, ServerError, serve

# Mean difference of log-probabilities, nats: models that have nothing in common differ by 1.1.
AGREEMENT = 0.6
STEP_REPEATS = 20
STEP_TOKENS = 128
MOST_ATTEMPTS = 3  # at a load in which no kernel is compiled
PROFILED_SEQUENCES = (1, 32)
PROFILED_PREFILL = 8192 - 64
OF_PYTORCH = 0.97  # of a server's memory: a CUDA context and the kernels' code take the rest


@dataclass(frozen=True)
class Contender:
    """One way to run the experts: what it adds to the command and to the environment."""

    name: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def contender(name: str, expert_format: str) -> Contender:
    if name in OURS:
        settings = {"formats": expert_format}
        if name == "plugin_fp8":
            settings["activations"] = "fp8"
        elif expert_format == "mxfp4":
            settings["activations"] = "bf16"
        return Contender(name, (f"--additional-config={json.dumps({'dsv4_moe': settings})}",))
    own = () if name == "default" else (f"--moe-backend={name}",)
    return Contender(name, own, {"VLLM_PLUGINS": PLUGIN_NAME})


class Bench:
    """Servers that run, what was measured of them, and until when."""

    def __init__(
        self,
        folder: Path,
        config: dict,
        results: dict,
        keep: Callable[[], None],
        deadline: float,  # of time.monotonic()
    ) -> None:
        self.folder, self.results, self.keep, self.deadline = folder, results, keep, deadline
        self.model = write_model(folder / "model", config)
        self.site = write_entry_point(folder / "site")
        self.servers: dict[str, Server] = {}
        self.random = random.Random(0)
        self.lock = threading.Lock()
        self.vocab = config["vocab_size"]
        self.compared: dict[str, list[float]] = {}
        self.prompts = [self.tokens(64) for _ in range(4)]
        self.is_ended = False

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def environment(self, of: Contender, num_servers: int) -> dict[str, str]:
        """Of one of so many servers that share a GPU."""
        paths = [str(self.site), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_DEEP_GEMM_WARMUP": "skip",
            MEMORY_FRACTION: str(OF_PYTORCH / num_servers) if num_servers > 1 else "",
            **of.environment,
        }

    @contextmanager
    def started(self, contenders: Sequence[Contender], arguments: Sequence[str]) -> Iterator[None]:
        """All of them, at once; one that does not start is a row and costs no other."""
        count = len(contenders)
        with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
            try:
                list(pool.map(lambda each: self.start(stack, each, arguments, count), contenders))
            except BaseException:
                self.is_ended = True
                raise
            names = [each.name for each in contenders if each.name in self.servers]
            self.servers = {name: self.servers[name] for name in names}
            try:
                yield
            finally:
                self.servers.clear()

    def start(
        self, stack: ExitStack, one: Contender, arguments: Sequence[str], num_servers: int
    ) -> None:
        given = [*arguments, *one.arguments]
        row: dict = {"contender": one.name, "arguments": given}
        with self.failing(row):
            log = self.folder / f"{one.name}.log"
            self.servers[one.name] = stack.enter_context(self.server(one, given, log, num_servers))
            row |= readiness(self.servers[one.name])
        self.add("servers", row)

    def start_alone(self, one: Contender, config: dict, arguments: Sequence[str]) -> None:
        """By itself, as large as the GPU holds: how soon it is ready, and its KV cache."""
        row = {"contender": one.name, "layers": config["num_hidden_layers"]}
        self.model = write_model(self.folder / f"{one.name}-alone", config)
        with self.failing(row):
            log = self.folder / f"{one.name}-alone.log"
            with self.server(one, [*arguments, *one.arguments], log, 1) as server:
                row |= readiness(server)
        self.add("starts", row)

    def server(self, one: Contender, arguments: Sequence[str], log: Path, num_servers: int):
        environment, left = self.environment(one, num_servers), self.left()
        return serve(self.model, log, arguments, environment, left, progress=self.go_on)

    def go_on(self, *_) -> None:
        """Of a server that starts; ServerError where this process is to end."""
        if self.is_ended:
            raise ServerError("the bench was ended")

    @contextmanager
    def failing(self, row: dict) -> Iterator[None]:
        """What fails is kept in the row, and costs no other."""
        try:
            yield
        except Exception as failure:
            row["failure"] = str(failure)[-3000:] or repr(failure)

    def add(self, part: str, row: dict) -> None:
        """Keep a row and say what it is."""
        said = {k: v for k, v in row.items() if k not in ("arguments", "kernels", "timeline")}
        words = json.dumps(said, ensure_ascii=False)
        with self.lock:  # servers start in threads
            self.results.setdefault(part, []).append(row)
            self.keep()
            print(f"{self.left():5.0f} s left, {part}: {words[:600]}", flush=True)

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(10, self.vocab) for _ in range(count)]

    def compare(self) -> None:
        """With the first that ever ran. A server whose log-probabilities are not finite, or another
        model's, is left out."""
        for name, server in list(self.servers.items()):
            row: dict = {"contender": name}
            with self.failing(row):
                found = [value for p in self.prompts for value in log_probabilities(server, p)]
                self.compared[name] = found
                first = next(iter(self.compared.values()))
                row["difference"] = mean(map(abs, map(sub, found, first)))
                if row["difference"] > AGREEMENT:
                    row["failure"] = f"mean difference above {AGREEMENT}"
            if "failure" in row:
                del self.servers[name]
            self.add("agreement", row)

    def load(self, load: Load, number: int, clocks: Clocks, until: float) -> None:
        """Every server in turn, again where a kernel was compiled meanwhile, if that leaves `until`
        seconds. `number` counts from 1 how often it was loaded so."""
        names = list(self.servers)
        if number == 1:
            with self.client_log(), ThreadPoolExecutor(max(1, len(names))) as pool:
                list(pool.map(lambda name: self.loaded(name, load.warm_up(), 0), names))
        for name in names if number % 2 else reversed(names):
            for _ in range(MOST_ATTEMPTS):
                row: dict = {"contender": name, "load": load.name}
                with self.client_log(), clocks.during(row):
                    row |= self.loaded(name, load, number)
                self.add("loads", row)
                if not row.get("compiled") or self.left() - until < row["seconds"]:
                    break

    def loaded(self, name: str, load: Load, seed: int) -> dict:
        row: dict = {}
        with self.failing(row):
            row |= measure(self.servers[name], self.model, load, seed, max(1.0, self.left()))
        return row

    @contextmanager
    def client_log(self) -> Iterator[None]:
        """What vLLM's client prints goes into a file."""
        with (self.folder / "client.log").open("a") as log, redirect_stdout(log):
            yield

    def loads(self, which: Sequence[Load], number: int, clocks: Clocks, until: float) -> bool:
        """Those that the time is enough for; whether there was one."""
        any_fits = False
        for load in which:
            if self.left() - until > self.expected_seconds(load):
                self.load(load, number, clocks, until)
                any_fits = True
        return any_fits

    def expected_seconds(self, load: Load) -> float:
        """Of all servers: what it last took when nothing was compiled, or a guess."""
        rows = [r for r in self.results.get("loads", ()) if r["load"] == load.name]
        clean = [r for r in rows if "failure" not in r and not r.get("compiled")]
        took = {r["contender"]: r["seconds"] for r in clean}.values()
        guess = 2 + load.requests * load.prompt / 50_000 + load.new * 0.03
        return len(self.servers) * (max(took) if took else guess)

    def steps(self) -> None:
        """Of one sequence: the graph's time and the step's, the servers by turns."""
        taken: dict = {name: {"graph_ms": [], "step_ms": []} for name in self.servers}
        self.results.setdefault("steps", {}).update(taken)
        for _ in range(STEP_REPEATS):
            if self.left() < 2 * len(taken):
                break
            for name, server in self.servers.items():
                graph = rpc(server, "bench_graph", 1)["graph_ms"]
                before = inter_token_seconds(server)
                server.complete(self.tokens(32), max_tokens=STEP_TOKENS, ignore_eos=True)
                taken[name]["graph_ms"].append(graph)
                taken[name]["step_ms"].append(step_ms(before, inter_token_seconds(server)))
        self.keep()

    def profile(self) -> None:
        """The kernels of decode steps and of one prefill step."""
        for name, server in self.servers.items():
            self.attempt(f"profile of {name}", lambda: self.profile_one(name, server))

    def profile_one(self, name: str, server: Server) -> None:
        for sequences in PROFILED_SEQUENCES:
            # A graph reads what the last step left in its buffers.
            with self.client_log():
                self.loaded(name, Load(sequences, 32, 8), 0)
            found = rpc(server, "bench_graph_kernels", sequences)
            self.add("profile", {"contender": name, "step": f"decode {sequences}", **found})
        prompt = self.tokens(PROFILED_PREFILL)
        server.complete(prompt, max_tokens=1)
        rpc(server, "bench_trace")
        server.complete(prompt, max_tokens=1)
        found = rpc(server, "bench_traced")
        step = f"prefill {PROFILED_PREFILL}"
        self.add("profile", {"contender": name, "step": step, **found})

    def memory(self) -> None:
        for row in self.results["servers"]:
            if server := self.servers.get(row["contender"]):
                row |= rpc(server, "bench_memory")
        self.keep()

    def attempt(self, what: str, call: Callable[[], None]) -> None:
        row: dict = {"part": what}
        with self.failing(row):
            call()
        if "failure" in row:
            self.add("failures", row)


def readiness(server: Server) -> dict:
    return {"ready_s": round(server.load_seconds, 1), "kv_tokens": kv_tokens(server.log)}


def log_probabilities(server: Server, prompt: list[int]) -> list[float]:
    """Of every token of the prompt after the first. ServerError where one is not finite."""
    answer = server.complete(prompt, max_tokens=1, temperature=0, prompt_logprobs=0)
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    values = [e[str(token)]["logprob"] for token, e in zip(prompt[1:], entries, strict=True)]
    if not all(map(math.isfinite, values)):
        raise ServerError("a log-probability is not finite")
    return values
