"""Opens a checkpoint: a directory with safetensors files, one such file, one in GGUF, a hub id, or made-up weights; checks it,
then streams its tensors.

Everything that can be known from the configuration and the headers is checked before any tensor is read. Knows nothing
of what the tensors are for. Only the tensor being read is in memory.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.config import ModelConfig
from models.errors import UserError
from models.families import family_of
from models.files import read_json_object
from models.formats import PLAIN, Formats, chosen_formats
from models.hf_config import read_config
from models.locate import INDEX_FILE, SAFETENSORS, SINGLE_FILE, is_gguf, locate
from models.quantization import Part, Scheme, scheme_of
from models.quantization.source import Contents, QuantisedSource, StoredMatrix, contents, formats_of
from models.random_weights import PREFIX as RANDOM_PREFIX
from models.random_weights import RandomWeights, random_config
from models.rope import inverse_frequencies
from models.safetensors_file import open_file, read_tensor
from models.safetensors_header import Entry, read_header
from models.sampling_defaults import NOTHING, SamplingDefaults, of_directory, of_gguf
from models.stored import Piece, stored_tensors
from models.weights import EMBEDDING, HEAD, WeightSource, parameter_count

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
COMPARED_ELEMENTS = 2**23
SMALL = 2**29  # bytes of weights in bf16, up to which those that are stored quantised are widened
MAPPED_BYTES = 2**22  # read of a file before it is mapped anew: few, for they count as memory; each mapping reads the header

_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,255}")
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # computed anew; old versions of transformers saved it

if TYPE_CHECKING:
    from models.gguf.file import GgufFile

Headers = dict[Path, dict[str, Entry]]


@dataclass(frozen=True)
class SafetensorsSource:
    """A `WeightSource` over checked files: `files` pairs each path with the tensors to read from it, in the order of
    their bytes; `pieces` are those of tensors that are handed over in some."""

    files: tuple[tuple[Path, tuple[str, ...]], ...]
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`. Raises `UserError` when a file changed since it was checked."""
        for path, names in self.files:
            file, read = open_file(path), 0
            for name in names:
                for piece in self.pieces.get(name, (Piece(name),)):
                    if read > MAPPED_BYTES:  # what was read of the file leaves memory with its mapping
                        del file
                        file, read = open_file(path), 0
                    tensor = read_tensor(path, file, name, piece.place)
                    read += tensor.nbytes
                    yield piece.name, tensor
                    del tensor
            del file


@dataclass(frozen=True)
class Checkpoint:
    """A checked model. `stored_dtype` is the type in which its embedding is handed over. Its tokenizer lies in `directory`, or
    in `gguf`; made-up weights have neither."""

    config: ModelConfig
    source: WeightSource
    directory: Path | None
    stored_dtype: torch.dtype
    gguf: GgufFile | None = None
    sampling: SamplingDefaults = NOTHING
    formats: Formats = PLAIN  # of its matrices, as they are stored

    def chosen_formats(self, weights: str | None, head: str | None = None) -> Formats:
        """The formats that options name; where none is named those that are stored, but bf16 for a model of at most SMALL
        bytes in it.  Hops between SMs, not bytes, are what a step of such a model takes, and quantised ones take longer
        (docs/formats.md)."""
        small = torch.bfloat16.itemsize * parameter_count(self.config) <= SMALL
        return chosen_formats(weights, head, PLAIN if small else self.formats)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a directory, a file in GGUF, one in safetensors with its config.json beside it, what the hub has (as "owner/name",
    or "owner/name/file.gguf", downloaded if need be) or "random:<preset>".

    Raises `UserError` naming the file and the tensor at fault: no tensor may be missing, left over (RoPE buffers and a
    head that is tied aside), of a wrong shape or of another type than bf16, fp16 and fp32.
    """
    if str(model).startswith(RANDOM_PREFIX):
        weights = RandomWeights(random_config(str(model)))
        return Checkpoint(weights.config, weights, None, weights.dtype)
    path = locate(model)
    if is_gguf(path):
        return _open_gguf(path)
    directory = path if os.path.isdir(path) else path.parent
    config, scheme = _read_config(directory), _read_scheme(directory)
    listing, headers = _read_headers(directory) if path == directory else _read_file(path)
    owners = {name: path for path, entries in headers.items() for name in entries}
    tensors = stored_tensors(config, owners)
    try:
        if scheme is not None and config.num_experts:
            raise UserError("quantised mixtures of experts are not supported: take the bf16 checkpoint, and say --weights fp8")
        found = contents(scheme, {name: tensor.shape for name, tensor in tensors.items()}, owners)
    except UserError as error:
        raise UserError(f"{listing}: {error}") from None
    _check_tensors(config, listing, headers, owners, found)
    if config.tied_embeddings and HEAD in owners:
        _check_tied(owners[EMBEDDING], owners[HEAD])
    plain = tensors.keys() - found.quantised.keys()
    files = tuple((path, tuple(name for name in entries if name in plain)) for path, entries in headers.items())
    source: WeightSource = SafetensorsSource(files, {name: tensor.pieces for name, tensor in tensors.items()})
    if scheme is not None and found.quantised:
        source = QuantisedSource(source, scheme, _stored_matrices(found, scheme, owners))
    stored, sampling = DTYPES[headers[owners[EMBEDDING]][EMBEDDING].dtype], of_directory(directory)
    return Checkpoint(config, source, directory, stored, sampling=sampling, formats=formats_of(scheme, found))


def _stored_matrices(found: Contents, scheme: Scheme, owners: dict[str, Path]) -> tuple[StoredMatrix, ...]:
    """The quantised matrices in the order of the network, with the files of their parts."""
    matrices = []
    for name, (rows, columns) in found.quantised.items():
        module = name.removesuffix("weight")
        parts = [part for part in (*scheme.parts(rows, columns), *scheme.optional(rows, columns)) if module + part in owners]
        matrices.append(StoredMatrix(name, rows, columns, {part: owners[module + part] for part in parts}))
    return tuple(matrices)


def _read_scheme(directory: Path) -> Scheme | None:
    return scheme_of(read_json_object(directory / "config.json"))  # which `_read_config` has found good


def _open_gguf(path: Path) -> Checkpoint:
    from models.gguf.model import open_gguf  # here, because whoever has no such file needs no library for them

    model = open_gguf(path)
    sampling = of_gguf(path, model.file.values)
    return Checkpoint(model.config, model.source, None, model.stored_dtype, model.file, sampling, model.formats)


def _read_config(directory: Path) -> ModelConfig:
    config = read_config(directory)
    try:
        inverse_frequencies(config)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    return config


def _read_headers(directory: Path) -> tuple[Path, Headers]:
    """The file that says what is in the checkpoint, and the checked header of every safetensors file."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if os.path.exists(single):
        return single, {single: _checked_header(single)}
    if not os.path.exists(index):
        raise UserError(_no_weights(directory))
    weight_map = _read_index(index)
    headers: Headers = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if not os.path.exists(path):
            tensor = next(name for name, file in weight_map.items() if file == shard)
            raise UserError(f"{path}: shard is missing, {index.name} has {tensor} in it, download it")
        headers[path] = _checked_header(path)
    _check_index(index, weight_map, headers)
    return index, headers


def _read_file(path: Path) -> tuple[Path, Headers]:
    """As `_read_headers` does, of one file: where an index has it, of all those in the index."""
    index = path.with_name(INDEX_FILE)
    if path.name == SINGLE_FILE or (os.path.exists(index) and path.name in _read_index(index).values()):
        return _read_headers(path.parent)
    return path, {path: _checked_header(path)}


def _no_weights(directory: Path) -> str:
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror}") from None
    others = sorted(name for name in names if Path(name).suffix in (".bin", ".pth", ".gguf", SAFETENSORS))
    found = f" (found {others[0]})" if others else ""
    return f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}, save the model with save_pretrained"


def _checked_header(path: Path) -> dict[str, Entry]:
    header = read_header(path)
    with open_file(path):  # the library has checks of its own
        return header


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map, download it anew")
    for tensor, shard in weight_map.items():
        # by its text alone: in the hub's cache the files are links to elsewhere
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise UserError(
                f"{index}: tensor {tensor} is in {str(shard)[:80]!r}, which is no file name in this directory, mend it"
            )
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], headers: Headers) -> None:
    """Index and shards say the same."""
    counts = Counter(name for entries in headers.values() for name in entries)
    for path, entries in headers.items():
        for name in entries:
            if counts[name] > 1:
                first, second, *_ = (path.name for path, entries in headers.items() if name in entries)
                raise UserError(f"{path}: tensor {name} is in both {first} and {second}, remove one")
            if weight_map.get(name) != path.name:
                raise UserError(f"{path}: tensor {name} is left over: {index.name} does not list it here, mend the index")
    for name, shard in weight_map.items():
        if name not in counts:
            raise UserError(
                f"{index.with_name(shard)}: tensor {name} is missing, {index.name} lists it, download the shard anew"
            )


def _check_tensors(config: ModelConfig, listing: Path, headers: Headers, owners: dict[str, Path], found: Contents) -> None:
    """Nothing missing, nothing left over, every shape and type as the configuration has it."""
    for name in found.needed:
        if name not in owners:
            raise UserError(f"{listing}: tensor {name} is missing, {_missing_mend(name)}")
    expected = found.needed | found.optional
    if config.tied_embeddings:
        expected[HEAD] = expected[EMBEDDING]  # some tools save a tied head all the same
    for name, path in owners.items():
        entry = headers[path][name]
        if name not in expected:
            if _HARMLESS.fullmatch(name):
                continue
            raise UserError(f"{path}: tensor {name} is left over, {_leftover_mend(config, name)}")
        _check_part(path, name, entry, expected[name])


def _check_part(path: Path, name: str, entry: Entry, part: Part) -> None:
    """Shape and type of one tensor."""
    if entry.shape not in part.shapes:
        raise UserError(
            f"{path}: tensor {name} has shape {list(entry.shape)}, but config.json makes it "
            f"{' or '.join(str(list(shape)) for shape in part.shapes)}: take both from the same model"
        )
    if entry.dtype not in part.dtypes:
        *others, last = part.dtypes
        raise UserError(
            f"{path}: tensor {name} is {entry.dtype}, which is not supported: save it as "
            f"{', '.join(others)}{' or ' if others else ''}{last}"
        )


def _missing_mend(name: str) -> str:
    if name == HEAD:
        return "set tie_word_embeddings to true in config.json if the head is tied"
    return "download the checkpoint anew, or take config.json from the same model"


def _leftover_mend(config: ModelConfig, name: str) -> str:
    key = f"{'attention' if '.self_attn.' in name else 'mlp'}_bias"
    if name.endswith("_proj.bias") and key in family_of(config).booleans:
        return f"set {key} to true in config.json if the model has biases"
    return "config.json describes no such tensor: take both from the same model"


def _check_tied(embedding_path: Path, head_path: Path) -> None:
    """A head saved beside the embedding it is tied to holds the same values."""
    with open_file(embedding_path) as embedding_file, open_file(head_path) as head_file:
        embedding, head = embedding_file.get_slice(EMBEDDING), head_file.get_slice(HEAD)
        count, width = embedding.get_shape()
        step = max(1, COMPARED_ELEMENTS // width)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            if not torch.equal(embedding[rows].float(), head[rows].float()):
                raise UserError(
                    f"{head_path}: tensor {HEAD} differs from {EMBEDDING}, but config.json ties them: "
                    "set tie_word_embeddings to false"
                )
