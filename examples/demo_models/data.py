"""Text, tokenizer and prompts of the demo pair: the standard library of the Python that runs this script.

No torch here. Token arrays are one-dimensional ``numpy.uint16`` (the vocabulary has 4,096 entries); every module
is followed by one end-of-text token.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
CONTEXT_LENGTH = 1024
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

#: Folders that are not ordinary library source: tests, third-party code, tables and generated files.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
    "lib-dynload",
    "encodings",  # code-page tables
    "pydoc_data",  # the language reference as string literals
    "__phello__",
}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

PROMPT_COUNT = 64
PROMPT_MIN_TOKENS = 60
PROMPT_MAX_TOKENS = 300
PROMPT_MAX_CHARACTERS = 3000  # spares tokenizing whole modules; a token is three or four characters


class DataError(Exception):
    """The text, the tokenizer or the prompts cannot be prepared; the message says what to do."""


@dataclass(frozen=True)
class Module:
    """One module of the standard library: dotted name and whole source text."""

    name: str
    text: str


def held_out_names() -> list[str]:
    """Dotted names in ``held_out.txt``, in file order."""
    lines = (HERE / "held_out.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _skipped(relative: Path) -> bool:
    """Whether a path below the standard library's folder is left out of the corpus."""
    return any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in relative.parts)


def _dotted(relative: Path) -> str:
    """``json/decoder.py`` -> ``json.decoder``; a package's ``__init__.py`` gets the package's name."""
    parts = list(relative.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_library() -> tuple[list[Module], list[Module]]:
    """Read the running Python's standard library; return (training modules, held-out modules), sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = set(held_out_names())
    training, kept_back = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _skipped(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            module = Module(_dotted(relative), text)
            (kept_back if module.name in held_out else training).append(module)
    missing = held_out - {module.name for module in kept_back}
    if missing:
        raise DataError(f"held-out modules that {root} lacks: {', '.join(sorted(missing))}; use CPython 3.11 or later")
    return training, kept_back


def train_tokenizer(modules: list[Module]) -> Tokenizer:
    """Train the byte-level BPE (``VOCAB_SIZE`` entries, the two specials first) on the modules' text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((module.text for module in modules), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise DataError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}: too little text")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers and vLLM load a tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        **specials,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", specials)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load ``folder/tokenizer.json``."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: run the 'tokenizer' step first")
    return Tokenizer.from_file(str(path))


def encode_modules(tokenizer: Tokenizer, modules: list[Module]) -> np.ndarray:
    """All modules as one stream of token ids, shape [tokens], uint16, an end-of-text token after each module."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([module.text for module in modules]):
        stream += encoding.ids
        stream.append(end)
    return np.asarray(stream, dtype=np.uint16)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- prompts ---------------------------------------------------------------------------------------------------


def start_line(node: ast.stmt) -> int:
    """First line (1-based) of a statement, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(item.lineno for item in decorators)])


def _functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Functions at the top level and methods of top-level classes, in source order."""
    found = []
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        found += [item for item in inner if isinstance(item, ast.FunctionDef)]
    return found


def natural_starts(tree: ast.Module) -> list[int]:
    """Lines (1-based) where a prompt may begin: the module's top, each top-level class or function, each method."""
    definitions = (ast.FunctionDef, ast.ClassDef)
    starts = [1]
    for node in tree.body:
        if isinstance(node, definitions):
            starts.append(start_line(node))
            starts += [start_line(item) for item in node.body if isinstance(item, definitions)]
    return starts


def _cut_line(function: ast.FunctionDef) -> int | None:
    """Line (1-based, inclusive) to end a prompt at: the docstring's last, else the signature's last.

    None when fewer than four lines of the body would be left to write.
    """
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    cut = first.end_lineno if documented else first.lineno - 1
    if cut < function.lineno or function.end_lineno - cut < 4:
        return None
    return cut


def module_prompts(module: Module, tokenizer: Tokenizer, rng: np.random.Generator) -> list[str]:
    """One prompt for each function of this module that has room for one, in random order.

    A prompt ends without its line's newline: the newline and the next line's indentation are one token.
    """
    tree, lines = ast.parse(module.text), module.text.splitlines()
    starts, prompts = natural_starts(tree), []
    for function in _functions(tree):
        cut = _cut_line(function)
        if cut is None:
            continue
        texts = ["\n".join(lines[start - 1 : cut]).rstrip() for start in starts if start <= function.lineno]
        texts = [text for text in texts if len(text) <= PROMPT_MAX_CHARACTERS]
        fitting = [t for t in texts if PROMPT_MIN_TOKENS <= len(tokenizer.encode(t).ids) <= PROMPT_MAX_TOKENS]
        if fitting:
            prompts.append(fitting[int(rng.integers(len(fitting)))])
    return [prompts[i] for i in rng.permutation(len(prompts))]


def make_prompts(modules: list[Module], tokenizer: Tokenizer, seed: int) -> list[dict[str, str]]:
    """``PROMPT_COUNT`` records {"module", "prompt"} from the held-out modules, as evenly spread as they allow."""
    rng = np.random.default_rng(seed)
    offers = {module.name: module_prompts(module, tokenizer, rng) for module in modules}
    chosen: list[dict[str, str]] = []
    for rank in range(max(map(len, offers.values()))):
        for name, prompts in offers.items():
            if rank < len(prompts) and len(chosen) < PROMPT_COUNT:
                chosen.append({"module": name, "prompt": prompts[rank]})
    if len(chosen) < PROMPT_COUNT:
        raise DataError(f"the held-out modules offer only {len(chosen)} prompts, {PROMPT_COUNT} are wanted")
    return chosen


def write_prompts(path: Path, prompts: list[dict[str, str]]) -> None:
    """Write prompts as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in prompts), encoding="utf-8")


def read_prompts(path: Path) -> list[dict[str, str]]:
    """Read what ``write_prompts`` wrote."""
    if not path.is_file():
        raise DataError(f"{path} is missing: run the 'prompts' step first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
