"""`pytest benchmarks/`: options, collection, the replay of measured times, the closing table."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import targets
from benchmarks.replay import REPLAY
from benchmarks.session import BenchSession, Options, parse_names
from benchmarks.tables import closing_report

KEY = pytest.StashKey[BenchSession]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("di4c_fast", "benchmarks of di4c_fast")
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME[,NAME]"}
    group.addoption("--shape", **many, help="shapes to measure; an unknown name lists them")
    group.addoption("--backend", **many, help="variants to measure; an unknown name lists them")
    group.addoption("--dtype", help="fp32, bf16 or fp16 (default: bf16 on a GPU, fp32 on a CPU)")
    group.addoption("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.addoption("--size", help="full, small or tiny (default: full on a GPU, small on a CPU)")
    group.addoption("--seconds", type=float, help="seconds of timed calls per variant")
    group.addoption("--rounds", type=int, help="turns of every variant")
    group.addoption("--threads", type=int, help="CPU threads (default: PyTorch's)")
    group.addoption("--time-budget", type=float, help="seconds after which groups are skipped")
    group.addoption("--results", type=Path, help="folder of results.json and results.csv")
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory")
    group.addoption("--compile-all", action="store_true", help="torch.compile at all CPU shapes")
    group.addoption("--resume", action="store_true", help="keep what an interrupted run measured")
    group.addoption("--launch-parameters", type=Path, help="JSON of kernels/configs to use")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install '.[bench]'")
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("markers", "measures(what): the plan of groups a benchmark measures")
    if hasattr(config.option, "benchmark_quiet") and not config.option.benchmark_json:
        config.option.benchmark_quiet = True  # the closing table says more
    option = config.getoption
    began = time.monotonic()

    def progress(text: str) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        capture = config.pluginmanager.get_plugin("capturemanager")
        if reporter is None:
            return
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        # Within a test, what is written would otherwise be kept until the test fails.
        shown = capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()
        with shown:
            reporter.ensure_newline()
            reporter.write_line(f"{minutes:3d}:{seconds:02d} {text}")
            reporter.flush()

    try:
        config.stash[KEY] = BenchSession(
            Options(
                shapes=parse_names(option("--shape")),
                backends=parse_names(option("--backend")),
                dtype=option("--dtype"),
                device=option("--device"),
                size=option("--size"),
                seconds=option("--seconds"),
                rounds=option("--rounds"),
                threads=option("--threads"),
                time_budget=option("--time-budget"),
                results=option("--results"),
                memory=not option("--no-memory"),
                compile_all=option("--compile-all"),
                resume=option("--resume"),
                launch_parameters=option("--launch-parameters"),
            ),
            progress,
        )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("measures")
    if marker is None:
        return
    session = metafunc.config.stash[KEY]
    parameters = [
        pytest.param(entry.case.key, variant.name, id=f"{entry.case.key}-{variant.name}")
        for entry in session.plan(marker.args[0])
        for variant in entry.variants
    ]
    metafunc.parametrize(("group", "variant"), parameters)


def pytest_collection_finish(session: pytest.Session) -> None:
    bench = session.config.stash[KEY]
    for item in session.items:
        if "group" in getattr(getattr(item, "callspec", None), "params", {}):
            parameters = item.callspec.params  # type: ignore[attr-defined]
            bench.select(parameters["group"], parameters["variant"])


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[KEY].out_of_time = True  # the set is not complete


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """Measures the group of a test if that has not happened, and reports one variant of it."""
    session = request.config.stash[KEY]

    def report(group: str, variant: str) -> None:
        record = session.records(group)[variant]
        if record["status"] == "skipped":
            pytest.skip(record["reason"])
        if record["status"] != "ok":
            text = f"{record['title']}: {record['status']}, {record['reason']}"
            # What others wrote may be broken here; what we wrote may not.
            if record["library"] or record["status"] == "wrong":
                pytest.fail(text, pytrace=False)
            pytest.skip(text)
        for name in ("peak_bytes", "loss_error", "gradient_error", "floor_seconds"):
            benchmark.extra_info[name] = record[name]
        benchmark.group = record["shape"]
        if record["samples"]:
            REPLAY.play(benchmark, record["samples"])
        else:
            benchmark.disabled = True  # nothing was timed
            benchmark(lambda: None)

    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if KEY not in session.config.stash:
        return
    interrupted = exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
    bench = session.config.stash[KEY]
    bench.finish(interrupted or session.shouldstop is not False, deselected=bench.out_of_time)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if KEY not in config.stash:
        return
    bench = config.stash[KEY]
    if bench.machine is None:
        return
    records = bench.results.records
    kind = bench.results.header["machine"]["kind"]
    terminalreporter.section("results")
    described = bench.results.header["machine"]
    terminalreporter.write_line(
        f"{described['device']}, {described['threads']} threads, copies "
        f"{bench.machine.bytes_per_second / 1e9:.1f} GB/s, multiplies "
        + ", ".join(
            f"{rate / 1e12:.2f} TFLOP/s {name}" for name, rate in bench.machine.flops.items()
        )
    )
    for line in closing_report(records, targets.judge(records, kind)):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    done = bench.results.header.get("complete")
    terminalreporter.write_line(
        f"{'complete' if done else 'partial'} results in {_shown(bench.results.folder)}"
    )


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
