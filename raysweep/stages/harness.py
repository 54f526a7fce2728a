"""Tasks of lm-evaluation-harness: found, tied to the bytes they are made of, and run.

The harness (Gao et al., 2024), whose package is lm_eval, is an extra: `pip install 'raysweep[lm-eval]'`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from raysweep.data import hub
from raysweep.data.digests import Digests, content_fingerprint, kept_digests
from raysweep.data.files import digests_of, resolve
from raysweep.data.pinned import compare
from raysweep.document import nearest
from raysweep.errors import DataError, StageError
from raysweep.spec import Direction, Provenance, Spec

_LOADERS = ("json", "csv", "text", "parquet", "arrow")
"""What `datasets` calls its readers of files."""
_FEWSHOT_SEED = 1234
"""Of the draw of solved examples: the harness's own default."""
_BOOTSTRAPS = 1000
"""By which it finds errors of what is no mean, to about 1 / sqrt(2 x 1000) = 2 %."""


class HarnessScore(Spec):
    """A number that the harness gives of a task."""

    metric: str
    """Of the harness's own names, such as acc_norm."""
    filter: str
    """What its answers went through; "none" is the usual one."""
    direction: Direction | None
    """Which values are better, as the task or the harness says."""

    @property
    def name(self) -> str:
        """What a column calls it."""
        return self.metric if self.filter == "none" else f"{self.metric}_{self.filter}"


class PinnedTask(Spec):
    """A task of the harness as it was when the sweep file was loaded."""

    version: str
    """Of the harness."""
    name: str
    """What the task calls itself."""
    fingerprint: str
    """Of the contents of all its files: its YAML, what that includes, the modules of its functions with those beside
    them, and in packages there, that they import, and its data. What PYTHONPATH finds in other folders is no part."""
    files: Annotated[tuple[str, ...], Provenance()]
    """The YAML file first: absolute paths; relative to the harness's own folder where they are a part of it."""
    data: Annotated[dict[str, tuple[str, ...]], Provenance()]
    """Split to the files that it is read from; empty of a data set of the hub."""
    digests: Annotated[Digests, Provenance()]
    """Of each file, as `files` and `data` name it."""
    revision: str
    """Commit of a data set of the hub; empty where there is none."""
    num_fewshot: int
    """Solved examples before a question."""
    output_type: str
    """What a model is asked for, in the harness's words."""
    max_new_tokens: Annotated[int, Provenance()]
    """Of an answer that is written, which the harness keeps free of a model's positions; 0 where none is."""
    scores: tuple[HarnessScore, ...]
    """What it is scored by."""


class Found(NamedTuple):
    """What an evaluation gives."""

    values: dict[str, float]
    """Of each score the value by its name and the standard error by name_stderr; NaN where the harness gives none."""
    num_cut: int
    """Requests that the model could not read whole."""
    document: dict[str, Any]
    """What the harness reports, as JSON."""


def pin_task(given: str, base: Path, *, num_fewshot: int | None) -> PinnedTask:
    """A task found and fingerprinted; no data set is read.

    Args:
        given: the name of a task of the harness, or a YAML file.
        base: folder that a file is relative to.
        num_fewshot: solved examples before a question; None: as many as the task says.

    Raises:
        DataError: if the harness is not installed, there is no such task, or a part of it is missing or cannot be
            pinned.
    """
    path = _yaml_file(given, base)
    files, config = _parts(path), _config(path)
    _refuse(config, given)
    output_type = config.get("output_type", "generate_until")
    data = _data_files(config, path.parent, given)
    digests = {_stored(Path(file)): sha256 for file, sha256 in kept_digests(map(str, files)).items()}
    digests |= digests_of(path for paths in data.values() for path in paths)
    return PinnedTask(
        version=_version(),
        name=config["task"],
        fingerprint=content_fingerprint(digests.values()),
        files=tuple(map(_stored, files)),
        data=data,
        digests=digests,
        revision="" if data else _revision(config),
        num_fewshot=config.get("num_fewshot") or 0 if num_fewshot is None else num_fewshot,
        output_type=output_type,
        max_new_tokens=_max_new_tokens(config) if output_type == "generate_until" else 0,
        scores=tuple(_scores(config)),
    )


def check_answers(task: PinnedTask, num_positions: int) -> None:
    """See that the answers of a task leave a model room for a prompt, whose beginning the harness cuts for them.

    Raises:
        DataError: if the model has not one position more than answers may have tokens.
    """
    if task.max_new_tokens >= num_positions:
        raise DataError(
            f"answers may have {task.max_new_tokens:,} tokens, and the model has {num_positions:,} positions for "
            f"prompt and answer: name a YAML file that has include: {_located(task.files[0])} and generation_kwargs: "
            "{max_gen_toks: ...}, or give the model more positions"
        )


def evaluate(task: PinnedTask, model: Any, tokenizer: Any, *, limit: int | None, batch_sequences: int) -> Found:
    """A task's scores of a causal model.

    Args:
        task: as it was pinned.
        model: on the device that it runs on, in evaluation mode.
        tokenizer: the model's.
        limit: examples, the first so many; None: all.
        batch_sequences: rows that are read at once.

    Raises:
        StageError: if the harness is another version.
        DataError: if a file is not as it was pinned, or the model has too few positions for answers.
    """
    if _version() != task.version:
        raise StageError(
            f"lm_eval {task.version} was there when the sweep was loaded, and here is {_version()}: install one of them"
        )
    for path, sha256 in task.digests.items():
        if not hub.is_dataset(path):  # A commit is what it is.
            compare(str(_located(path)), sha256)
    import lm_eval

    harness = _counting(model, tokenizer, batch_sequences)
    check_answers(task, harness.max_length)
    with _one_process(), tempfile.TemporaryDirectory() as folder, _seeded():
        loaded = _manager(_written(task, Path(folder))).load([task.name])
        loaded["tasks"][task.name].set_fewshot_seed(seed=_FEWSHOT_SEED)
        report = lm_eval.evaluate(harness, loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
    found = report["results"][task.name]
    values = {
        f"{score.name}{end}": _number(found, f"{score.metric}{end},{score.filter}")
        for score in task.scores
        for end in ("", "_stderr")
    }
    kept = {name: report[name] for name in ("results", "n-samples", "n-shot", "versions") if name in report}
    return Found(values, harness.num_cut, json.loads(json.dumps(kept, default=str)))


def _version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError("lm-evaluation-harness is not installed; run: pip install 'raysweep[lm-eval]'") from error


def _home() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).resolve().parent


def _stored(path: Path) -> str:
    """A path as it is stored: one of the harness's own is relative, as it lies elsewhere on another machine."""
    return str(path.relative_to(_home())) if path.is_relative_to(_home()) else str(path)


def _located(path: str) -> Path:
    return _home() / path


def _yaml_file(given: str, base: Path) -> Path:
    """The YAML file of a task. Raises DataError if there is none."""
    version = _version()
    if given.endswith((".yaml", ".yml")):
        path = (base / hub.expanded(given)).absolute()
        if not path.is_file():
            raise DataError(hub.unset(str(path)) or f"no file {given!r} (looked for {path})")
        return path
    tasks, groups = _builtin()
    if given in groups:
        raise DataError(f"{given!r} is a group of tasks in lm_eval; name its tasks one by one")
    if given not in tasks:
        close = nearest(given, list(tasks), most=1)
        meant = f", did you mean {close[0]!r}" if close else ""
        raise DataError(f"lm_eval {version} has no task {given!r}{meant}; a file of your own ends in .yaml")
    return tasks[given]


@cache
def _builtin() -> tuple[dict[str, Path], set[str]]:
    """Name -> file of the harness's tasks, and the names of its groups: by its own index that would take a minute."""
    tasks: dict[str, Path] = {}
    groups: set[str] = set()
    for folder, folders, names in os.walk(_home() / "tasks"):
        folders.sort()  # Where two tasks share a name, the same one everywhere.
        for name in sorted(names):
            if name.endswith(".yaml"):
                text = (path := Path(folder) / name).read_text(errors="replace")
                groups.update(_top_level(text, "group"))
                tasks |= dict.fromkeys(_top_level(text, "task"), path)
    return tasks, groups


def _top_level(text: str, key: str) -> list[str]:
    """The values of a key of a YAML file that is not indented, where it has one on its line."""
    return re.findall(rf"^{key}:[ \t]*[\"']?([^\s\"'#\[{{]+)", text, flags=re.MULTILINE)


def _parts(path: Path, seen: tuple[Path, ...] = ()) -> list[Path]:
    """A YAML file, those that it includes, and the modules of their functions with what they import; each once.

    Raises:
        DataError: if one cannot be read, or includes itself.
    """
    import yaml

    modules: list[Path] = []

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Functions stay names."""

    def function(loader: Any, suffix: str, node: Any) -> str:
        name = str(node.value)
        # As the harness looks for it: a module beside the file, wherever a link to that lies.
        module = path.resolve().parent / f"{name.rpartition('.')[0].replace('.', '/')}.py"
        modules.extend(_with_imported(module.resolve()) if module.is_file() else [])
        return name

    Loader.add_multi_constructor("!", function)
    if path in seen:
        raise DataError(f"{path} includes itself")
    try:
        content = yaml.load(path.read_bytes(), Loader)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); included by {seen[-1] if seen else path}"
        ) from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no mapping with task: and what belongs to it")
    includes = content.get("include", [])
    included = [
        part
        for name in (includes if isinstance(includes, list) else [includes])
        for part in _parts((path.parent / name).resolve(), (*seen, path))
    ]
    return [*dict.fromkeys([path, *included, *modules])]


def _with_imported(first: Path) -> list[Path]:
    """A module, those that it imports from beside it, and so on; what lies elsewhere is left out.

    Raises:
        DataError: if one is no Python.
    """
    modules = [first]
    for module in modules:  # Which grows.
        try:
            tree = ast.parse(module.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{module}: no Python: {error}") from error
        places = (place for node in ast.walk(tree) for place in _places_imported(node, module, first.parent))
        beside = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
        modules += [file for file in dict.fromkeys(beside) if file.is_file() and file not in modules]
    return modules


def _places_imported(node: ast.AST, module: Path, top: Path) -> Iterator[Path]:
    """Of what an import in `module` names, the packages around it, and what it takes from them: paths without suffix.

    What is taken may be a module, too. `top` is the folder of absolute names; relative ones start from the module's.
    """
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names]
        # `from .` is the module's own package, whose folder it lies in; each further dot is the package around that.
        top = module.parents[min(node.level, len(module.parents)) - 1] if node.level else top
    else:
        return
    for name in names:
        parts = name.split(".")
        yield from (top.joinpath(*parts[:end]) for end in range(1, len(parts) + 1))


def _max_new_tokens(config: Mapping[str, Any]) -> int:
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(dict(config.get("generation_kwargs") or {}))["max_gen_toks"])


def _config(path: Path) -> dict[str, Any]:
    """What the harness reads in a task's file, its functions as names. Raises DataError if that is no task."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.yaml").write_text(f"include: {json.dumps(str(path))}\n")
        entries = [*_manager(Path(folder)).task_index.values()]
    tasks = [entry for entry in entries if entry.kind.name == "TASK" and isinstance(entry.cfg.get("task"), str)]
    if len(tasks) != 1:
        raise DataError(f"{path}: lm_eval finds no task in it; it needs a line task: NAME, and no group or class")
    return dict(tasks[0].cfg)


def _manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def _refuse(config: Mapping[str, Any], given: str) -> None:
    """Raise DataError of a task that cannot be run here."""
    if config.get("unsafe_code"):
        raise DataError(f"{given}: it runs code that models write; raysweep does not")
    if config.get("custom_dataset"):
        raise DataError(
            f"{given}: its data come from a function (custom_dataset), which cannot be pinned; write them to a file, "
            "and name it as data_files"
        )
    for metric in config.get("metric_list") or ():
        name = str(metric["metric"])  # A function's has a folder before it.
        if metric.get("hf_evaluate") or ("/" not in name and name not in _own_metrics()):
            raise DataError(
                f"{given}: metric {name!r} is none of lm_eval's own, and would be fetched from the hub as it runs; use "
                "one of these, or a function (!function)"
            )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise DataError(f"{given}: it asks of images or sounds, which a model of text cannot read")


def _own_metrics() -> set[str]:
    import lm_eval.api.metrics  # noqa: F401 - which registers them
    from lm_eval.api.registry import METRIC_REGISTRY

    return {*METRIC_REGISTRY}


def _data_files(config: Mapping[str, Any], folder: Path, given: str) -> dict[str, tuple[str, ...]]:
    """Split -> absolute files; empty of a data set of the hub. Raises DataError where one is missing."""
    path = config.get("dataset_path")
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    if path not in _LOADERS:
        if path and (folder / str(path)).exists():
            raise DataError(f"{given}: dataset_path {path!r} is a folder; write json, and its files as data_files")
        return {}
    if not named:
        raise DataError(f"{given}: dataset_path {path} needs dataset_kwargs: {{data_files: ...}}")
    # As `datasets` has it: files without a split are for training.
    by_split = named if isinstance(named, dict) else {"train": named}
    return {
        split: resolve(tuple(files) if isinstance(files, list) else str(files), folder)
        for split, files in sorted(by_split.items())
    }


def _revision(config: Mapping[str, Any]) -> str:
    """The commit of a data set of the hub; empty where data come from a function."""
    name, revision = config.get("dataset_path"), (config.get("dataset_kwargs") or {}).get("revision")
    if not name or hub.is_commit(revision):
        return revision or ""
    return hub.dataset_commit(str(name), revision)


def _scores(config: Mapping[str, Any]) -> Iterator[HarnessScore]:
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better

    usual = [{"metric": name} for name in DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]]
    filters = [each["name"] for each in config.get("filter_list") or [{"name": "none"}]]
    for metric in config.get("metric_list") or usual:
        # A function goes by its own name, which stands behind that of its module.
        name = Path(str(metric["metric"])).name.rpartition(".")[2]
        is_better = metric.get("higher_is_better", is_higher_better(name))
        direction: Direction | None = None if is_better is None else "max" if is_better else "min"
        yield from (HarnessScore(metric=name, filter=each, direction=direction) for each in filters)


def _written(task: PinnedTask, folder: Path) -> Path:
    """Writes the task with its data where they are here, and gives the folder."""
    config: dict[str, Any] = {
        "include": str(_located(task.files[0])),
        "task": task.name,
        "num_fewshot": task.num_fewshot,
    }
    given = (_config(_located(task.files[0])).get("dataset_kwargs")) or {}
    if task.data:
        # Not the cache that runs share: it tells files by their times.
        here = {
            "data_files": {split: [*paths] for split, paths in task.data.items()},
            "cache_dir": str(folder / "data"),
        }
        config["dataset_kwargs"] = given | here
    elif task.revision:
        config["dataset_kwargs"] = given | {"revision": task.revision}
    (tasks := folder / "tasks").mkdir()
    (tasks / "task.yaml").write_text(json.dumps(config))  # JSON is YAML.
    return tasks


def _counting(model: Any, tokenizer: Any, batch_sequences: int) -> Any:
    """The harness's model, which counts requests that it could not read whole, and draws no progress bars."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Counting(HFLM):  # type: ignore[misc]
        num_cut = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            # The last token is not read, only predicted.
            texts = [context + answer for context, answer in (request.args for request in requests)]
            self.num_cut += sum(len(self.tok_encode(text)) > self.max_length + 1 for text in texts)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            for context, given in (request.args for request in requests):
                room = self.max_length - normalize_gen_kwargs(dict(given), self.max_gen_toks)["max_gen_toks"]
                self.num_cut += len(self.tok_encode(context)) > room
            return super().generate_until(requests, disable_tqdm=True)

    return Counting(pretrained=model, tokenizer=tokenizer, batch_size=batch_sequences)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Some tasks draw answers, or the order of choices: the same in each process. All draws go on as before then."""
    import numpy as np
    import torch

    drawn, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(_FEWSHOT_SEED)
        np.random.seed(_FEWSHOT_SEED)
        torch.manual_seed(_FEWSHOT_SEED)
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(arrays)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Without the harness's pool of processes for errors by bootstrap: forks of one that has threads may hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _number(found: Mapping[str, Any], name: str) -> float:
    """NaN of "N/A" too, which the harness writes where it knows no error."""
    value = found.get(name)
    return float(value) if isinstance(value, Real) else math.nan
