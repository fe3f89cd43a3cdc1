"""A Hugging Face checkpoint folder: which tensors it holds and where their bytes lie.

`model.safetensors.index.json` names the shard of every tensor; a small model is one
`model.safetensors`. Every shard's header is checked before any tensor is read, and all problems
are reported together. Only the headers are kept in memory.

A file may be a symbolic link only to the same folder or, in a Hugging Face cache
(`models--*/snapshots/<commit>/`), to that model's `blobs/`: a checkpoint must not make us read
other files of the machine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.json_reader import read_object
from convert.shard import Shard, Source
from quant.errors import Error, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHOWN = 12


def refuse(problems: list[str], where: str) -> None:
    """Raise one Error for all `problems`; nothing when there are none."""
    if not problems:
        return
    text = "; ".join(problems[:SHOWN])
    if len(problems) > SHOWN:
        text += f"; and {len(problems) - SHOWN} more"
    raise Error(f"{where}: {text}")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one folder; `tensors` by their Hugging Face names."""

    folder: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, Source]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Check every shard's header against the index."""
        if not folder.exists():
            raise UsageError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise UsageError(
                f"{folder}: a checkpoint folder is needed (config.json and *.safetensors)"
            )
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        refuse(
            [problem for name in names if (problem := _unsafe(folder, name))],
            str(folder / INDEX),
        )
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise Error(
                f"{folder}: {len(absent)} of {len(names)} shards are missing: {', '.join(absent)}"
            )
        shards, problems = [], []
        for name in names:
            try:
                shards.append(Shard(folder / name))
            except Error as error:
                problems.append(str(error))
        refuse(problems, str(folder))
        tensors, problems = _gather(shards, weight_map)
        refuse(problems, str(folder))
        unlisted = sorted(
            path.name for path in folder.glob("model*.safetensors") if path.name not in names
        )
        notes = (f"not in the index, ignored: {', '.join(unlisted)}",) if unlisted else ()
        return cls(folder, tuple(shards), tensors, notes)

    def find(self, name: str) -> Path | None:
        """The path of a file beside the shards, None when there is none."""
        path = self.folder / name
        if not path.exists():
            return None
        refuse([problem for problem in [_unsafe(self.folder, name)] if problem], str(self.folder))
        return path

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file beside the shards, None when there is none."""
        path = self.find(name)
        return None if path is None else read_object(path)

    def input_files(self) -> list[Path]:
        """Every file of the folder that conversion may read."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Shard names by tensor name, None for a single-file checkpoint."""
    if (folder / INDEX).exists():
        refuse([problem for problem in [_unsafe(folder, INDEX)] if problem], str(folder))
        value = read_object(folder / INDEX).get("weight_map")
        if (
            not isinstance(value, dict)
            or not value
            or not all(isinstance(name, str) for name in value.values())
        ):
            raise Error(f"{folder / INDEX}: weight_map must name a shard for every tensor")
        return value
    if (folder / SINGLE).exists():
        return None
    if pickles := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")]):
        raise Error(
            f"{folder}: only {pickles[0].name}: a pickle can run any code when it is read; "
            "save the checkpoint as safetensors"
        )
    if any(folder.glob("*.gguf")):
        raise Error(f"{folder}: holds a GGUF file already, no {SINGLE}")
    raise Error(f"{folder}: no {SINGLE} and no {INDEX}")


def _unsafe(folder: Path, name: str) -> str | None:
    """Why the file `name` must not be opened, None when it may."""
    if (
        not name
        or "\0" in name
        or "/" in name
        or "\\" in name
        or name in (".", "..")
        or Path(name).is_absolute()
        or Path(name).drive
    ):
        return f"the file name {name!r} leaves the folder"
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = (folder / name).resolve()
    except (OSError, RuntimeError):
        return f"{name} is a link that leads nowhere"
    if not any(target.is_relative_to(place) for place in allowed):
        return f"{name} is a link that leaves the folder"
    return None


def _gather(
    shards: list[Shard], weight_map: dict[str, str] | None
) -> tuple[dict[str, Source], list[str]]:
    tensors: dict[str, Source] = {}
    problems = []
    for shard in shards:
        for name, source in shard.tensors.items():
            if name in tensors:
                first = tensors[name].shard.path.name
                problems.append(f"{name} is in {first} and in {shard.path.name}")
            tensors[name] = source
    for name, file in (weight_map or {}).items():
        if name not in tensors or tensors[name].shard.path.name != file:
            problems.append(f"{INDEX} puts {name} in {file}, which does not hold it")
    return tensors, problems
