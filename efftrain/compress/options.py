"""The options of ``efftrain compress``."""

from dataclasses import dataclass
from typing import Literal, get_args

from efftrain.compress.pruning.one_shot import PruneMethod
from efftrain.compress.quantization.convert import Method
from efftrain.compress.structured.shape_count import By
from efftrain.compress.structured.shapes import Way
from efftrain.errors import ConfigError
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.masks import SemiStructured, Structure, Unstructured
from efftrain.ops.number_formats import AnyFormat, parse_format

ALL_BLOCKS = "blocks/.*"


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The options of ``efftrain compress``, checked against each other.

    Attributes:
      quantize: number format of the weight matrices, such as int8 or int4:g32. With ``budget``, two or more formats
        separated by commas. None: the formats that the run was trained for.
      activations: number format of the inputs of the matrices. None: they stay float.
      cache: number format of the KV cache. None: that of the run, or float.
      layers: a regular expression for the names of the matrices; see ``models.quantization.QuantizationRule``.
      method: see ``compress.quantization.convert.convert`` and, with ``sparsity``, ``compress.pruning.one_shot.prune``.
        None: "nearest" without ``sparsity`` and "sparsegpt" with it.
      budget: the most bytes that the matrices of the blocks may take, as a share of their bytes in float32; each part
        of each layer gets the format that fits.
      rows: number of rows of text. Methods that read calibration text, and ``slim``, read this many rows of the
        training split; each trial of a budget or a search, and the bits per byte of a stage, use this many of the
        validation split.
      sparsity: the share of the weights that becomes zero, such as 0.5, or a pattern n:m, such as 2:4.
      slim: the share of ``by`` that structured pruning removes, so that the model gets smaller and faster.
      way: what structured pruning cuts: "width", "depth" or, with ``search``, "any", which tries both.
      by: what ``slim`` is a share of.
      search: number of shapes that are tried, each trained on a tenth of ``recover``. None: the first candidate is
        taken.
      recover: tokens of training after the pruning (healing). 0: none.
      rounds: number of rounds of pruning and training; ``recover`` is divided between them.
      distill: whether that training distils from the original run instead of training on the text.
    """

    quantize: str | None = None
    activations: str | None = None
    cache: str | None = None
    layers: str = ALL_BLOCKS
    method: Method | PruneMethod | None = None
    budget: float | None = None
    rows: int = 128
    sparsity: str | None = None
    slim: float | None = None
    way: Way = "width"
    by: By | Literal["latency"] = "parameters"
    search: int | None = None
    recover: int = 0
    rounds: int = 1
    distill: bool = False

    def __post_init__(self):
        if self.rows < 1:
            raise ConfigError(f"--rows is {self.rows}; give at least 1")
        self._check_quantization()
        self._check_pruning()

    def _check_quantization(self) -> None:
        if self.budget is not None and not 0 < self.budget < 1:
            raise ConfigError(f"--budget is {self.budget}; give a share between 0 and 1")
        if self.budget is not None and (self.quantize is None or "," not in self.quantize):
            raise ConfigError("--budget chooses between formats; give several, such as --quantize int8,int4:g32")
        if self.budget is None and "," in (self.quantize or ""):
            raise ConfigError(f"--quantize is {self.quantize}; give one format, or a --budget to choose by")
        if self.budget is not None and (self.activations or self.layers != ALL_BLOCKS):
            raise ConfigError("--budget is for the weights of all blocks; leave --activations and --layers out")
        if self.layers != ALL_BLOCKS and not (self.quantize or self.activations or self.sparsity):
            raise ConfigError("--layers is given and not what to do with them; add --quantize or --activations")
        for text in (self.quantize or "").split(","):
            QuantizationRule(weights=parse(text), activations=parse(self.activations))
        Quantization(cache=parse(self.cache))

    def _check_pruning(self) -> None:
        quantized = self.quantize or self.activations or self.cache or self.budget
        methods = get_args(Method) if self.sparsity is None else get_args(PruneMethod)
        if self.method is not None and self.method not in methods:
            raise ConfigError(
                f"--method is {self.method}; it is one of {', '.join(methods)} "
                f"{'without' if self.sparsity is None else 'with'} --sparsity"
            )
        if self.slim is not None:
            if not 0 < self.slim < 1:
                raise ConfigError(f"--slim is {self.slim}; give the share to cut off, between 0 and 1")
            if quantized or self.sparsity or self.method:
                raise ConfigError("--slim cuts and does nothing else; quantise or prune the new run afterwards")
        elif (self.way, self.by, self.search) != ("width", "parameters", None):
            raise ConfigError("--way, --by and --search say how --slim cuts; add --slim, such as --slim 0.33")
        if self.search is None and self.way == "any":
            raise ConfigError("--way any needs shapes to be tried; add --search 4 and --recover")
        if self.search is not None and (self.search < 2 or not self.recover):
            raise ConfigError(f"--search is {self.search}; give 2 shapes or more, and the tokens of --recover")
        if self.sparsity is not None:
            structure = self.structure
            if self.cache or self.budget:
                raise ConfigError("--sparsity goes together with neither --cache nor --budget; compress its run again")
            if quantized and self.method not in (None, "sparsegpt"):
                raise ConfigError("--sparsity and --quantize go together by sparsegpt alone; leave --method out")
            if isinstance(structure, SemiStructured) and self.rounds > 1:
                raise ConfigError(f"--sparsity {self.sparsity} is reached in one round; leave --rounds out")
        if self.recover < 0 or self.rounds < 1:
            raise ConfigError(f"--recover is {self.recover} and --rounds {self.rounds}; give no negative number")
        if self.recover and ((self.slim is None and self.sparsity is None) or quantized):
            raise ConfigError("--recover trains what --slim or --sparsity cut; train for quantised matrices by qat.py")
        if self.distill and not self.recover:
            raise ConfigError("--distill says how --recover trains; add it with a number of tokens")
        if self.rounds > 1 and not self.recover:
            raise ConfigError("--rounds needs training between them; add --recover with a number of tokens")

    @property
    def structure(self) -> Structure:
        """The pattern of zeros that ``sparsity`` describes.

        Raises:
          ConfigError: ``sparsity`` is neither a share nor n:m.
        """
        n, colon, m = self.sparsity.partition(":")
        try:
            return SemiStructured(n=int(n), m=int(m)) if colon else Unstructured(sparsity=float(n))
        except ValueError as error:
            raise ConfigError(f"--sparsity is {self.sparsity!r}; give a share such as 0.5, or 2:4") from error

    @property
    def chosen_on(self) -> int:
        """Number of rows, from the start of the validation split, on which shapes or formats are chosen."""
        return self.rows if self.search is not None or self.budget is not None else 0

    @property
    def name(self) -> str:
        """The suffix that the default name of the new run adds to the name of the old one."""
        words = [self.quantize or "", self.activations and f"a-{self.activations}", self.cache and f"kv-{self.cache}"]
        words += [self.sparsity and f"sparse{self.sparsity.replace(':', 'of')}", self.slim and f"slim{self.slim}"]
        words += [self.way if self.way != "width" else "", self.by if self.by != "parameters" else ""]
        words += [self.method if self.method not in (None, "nearest") else "", self.budget and f"{self.budget}x"]
        words += [f"search{self.search}" if self.search else "", self.recover and f"r{self.recover}"]
        words += [f"{self.rounds}rounds" if self.rounds > 1 else "", "distilled" if self.distill else ""]
        return "-".join(w for w in words if w).replace(":", "").replace(",", "-") or "stored"


def parse(text: str | None) -> AnyFormat | None:
    """Parses the name of a number format; None if there is no name."""
    return parse_format(text) if text else None
