"""The table of schemes and the matrix of schemes and models: the code on a few of them, and what it wrote into the README."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import hfpos
from hfpos.bench import conformance, probes
from hfpos.bench.catalogue import catalogue
from hfpos.bench.every_scheme import examine_all, examples_for, try_scheme
from hfpos.bench.examine import Cell, Row, longest_input, random_ids
from hfpos.bench.examples import PLAIN, all_examples, example
from hfpos.bench.matrix import part
from hfpos.bench.models import MODELS, build
from hfpos.bench.pairs import pairs_table
from hfpos.bench.shrink import TRAINED_LENGTH
from hfpos.scheme import Geometry, Rope
from tests.tiny import tiny


README = Path(__file__).parents[2] / "README.md"


def test_the_catalogue_in_the_readme_is_that_of_the_registry():
    assert part(README.read_text(encoding="utf-8"), "catalogue") == catalogue(), "run `make matrix`"


def test_the_matrix_in_the_readme_has_every_scheme_and_no_failure():
    body = part(README.read_text(encoding="utf-8"), "pairs")
    summary, *rows = [line for line in body.splitlines() if line.startswith(("Transformers", "| `"))]
    names = re.findall(r"`(\w+)`(?: \((\w+)\))?", " ".join(row.split("|")[1] for row in rows))
    found = [", ".join(filter(None, name)) for name in names]
    assert sorted(found) == sorted(all_examples()), "each once; run `make matrix`"
    assert summary.endswith("Failures: 0.")
    assert all(model in summary for model in MODELS)
    works, refused = map(int, re.search(r"(\d+) work and (\d+) are refused", summary).groups())
    assert works + refused == len(MODELS) * len(all_examples())
    assert works > 0.75 * (works + refused)
    for row in rows:
        _, _, count, others, _ = row.split("|")
        refusing = [name for name in others.strip().split(", ") if name]
        if refusing != ["all others"]:
            assert count.strip() == (f"{len(MODELS) - len(refusing)} of {len(MODELS)}" if refusing else "all")


def test_examples_suit_the_model():
    short = Geometry(heads=4, head_dim=16, rotary_dim=4, theta=500.0, trained_length=None, allowed_length=None)
    found = all_examples(short, layers=3)
    assert found.keys() == all_examples().keys()
    assert {label.partition(",")[0] for label in found} == hfpos.schemes().keys()
    assert found["yarn"].parameters()["original_length"] == TRAINED_LENGTH
    assert all_examples()["yarn"].parameters()["original_length"] is None
    assert len(found["longrope, exact"].short_factor) == 2
    assert found["abf"].theta == 5000
    assert len(found["per_layer"].schemes) == 3
    assert found["dynamic, pinned"].cache == "pinned"


def test_a_field_that_no_rule_knows_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Odd(Rope):
        name = "odd"

        temper: float

    with pytest.raises(hfpos.PatchError, match=r"odd: no rule gives an example of its required field 'temper'"):
        example(Odd)


@pytest.mark.parametrize("name", ["falcon (alibi)", "bert (encoder)", "t5"])
def test_models_of_other_kinds_are_small_and_of_their_kind(name):
    model, ids = build(name), random_ids()[:, :TRAINED_LENGTH]
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    swapped = ids.clone()
    swapped[:, [5, 9]] = swapped[:, [9, 5]]
    earlier = probes.difference(probes.logits(model, swapped)[:, 3], probes.logits(model, ids)[:, 3])
    assert (earlier > 0) == (name != "falcon (alibi)"), "an encoder sees what stands behind a token"
    assert probes.right_padding(model, ids) is None


def test_every_scheme_on_a_llama():
    row = examine_all("llama")
    assert not row.problem
    assert row.cells.keys() == all_examples().keys()
    assert not [label for label, cell in row.cells.items() if cell.status == "fails"], row.cells
    assert sum(cell.status == "works" for cell in row.cells.values()) >= 20


def test_probes_of_encoder_decoders_and_encoders_notice_what_is_wrong():
    t5, ids = build("t5"), random_ids()
    assert [probe(t5, ids) for probe in (probes.decoding, probes.left_padding, probes.right_padding)] == [None] * 3
    bert = build("bert (encoder)")
    assert "largest logit" in probes.left_padding(bert, ids[:, :TRAINED_LENGTH]), (
        "its table is counted from the padding"
    )
    assert probes.decoding(bert, ids[:, :TRAINED_LENGTH]) == "returns no cache"
    forward = t5.decoder.forward
    t5.decoder.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "past_key_values": None})
    assert probes.decoding(t5, ids) is not None


def _nothing(model, scheme):
    return PATCH(model, "linear", factor=1, prove=False)


def _half_done(model, scheme):
    torch.nn.init.zeros_(model.lm_head.weight)
    raise hfpos.PatchError("no")


PATCH = hfpos.patch


@pytest.mark.parametrize(
    ("scheme", "name", "instead", "message"),
    [
        (hfpos.schemes.Yarn(factor=4), "patch", _nothing, "silent: the logits do not move"),
        (hfpos.schemes.Yarn(factor=4), "patch", _half_done, "refused, yet the model is changed"),
        (hfpos.schemes.Yarn(factor=4), "unpatch", lambda model: model, "unpatch: logits are not bit-equal"),
        (
            hfpos.schemes.Kerple(),  # as if the weights it learned had not been saved
            "from_pretrained",
            lambda folder: PATCH(build("llama"), "kerple"),
            "saved and loaded by hfpos.from_pretrained: off by",
        ),
    ],
)
def test_what_does_not_hold_fails(monkeypatch, scheme, name, instead, message):
    monkeypatch.setattr(hfpos, name, instead)
    model = build("llama")
    cell = try_scheme(model, scheme, longest_input(model))
    assert cell.status == "fails"
    assert message in cell.note


def test_a_table_that_only_reaches_further_works():
    model = build("gpt2")
    assert try_scheme(model, hfpos.schemes.Learned(target_length=256), longest_input(model)) == Cell("works")


def test_a_model_that_cannot_be_built_is_a_row_with_its_reason(monkeypatch):
    assert examples_for(tiny("mamba"))["yarn"] == example(hfpos.schemes.Yarn, PLAIN)  # of no known family
    monkeypatch.setattr("hfpos.bench.shrink.PARAMETER_LIMIT", 10)
    assert "parameters left" in examine_all("llama").problem


def test_the_table_groups_schemes_of_equal_outcomes_and_says_why():
    works, refused = Cell("works"), "refused"
    rows = [
        Row("llama", cells={"yarn": works, "alibi": works, "dynamic, exact": works}),
        Row(
            "opt",
            cells={
                "yarn": Cell(refused, "'yarn' acts at the 'freq' seam"),
                "alibi": works,
                "dynamic, exact": Cell(refused, "'dynamic' acts at the 'freq' seam"),
            },
        ),
        Row("mpt", cells={"yarn": works, "alibi": Cell("fails", "off"), "dynamic, exact": works}),
        Row("blt", problem="needs a friend"),
    ]
    text = pairs_table(rows)
    assert (
        "3 models (llama, opt, mpt): of 9 pairs with a scheme 6 work and 2 are refused with a reason. Failures: 1."
        in text
    )
    assert "| `yarn`, `dynamic` (exact) | 2 of 3 | opt |" in text
    assert "| `alibi` | 2 of 3 | mpt |" in text
    assert "- `yarn`, `dynamic` (exact) refused by opt: it acts at the 'freq' seam" in text
    assert "- `alibi` fails by mpt: off" in text
    assert "- could not be built small: blt: needs a friend" in text


def test_the_command_writes_the_tables_and_notices_stale_ones(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(conformance, "MODELS", ("llama",))
    monkeypatch.setattr(conformance, "causal_lm_classes", lambda: {"llama": None})
    monkeypatch.setattr(conformance, "sweep", lambda examination, labels, names, processes: _rows(labels, names))
    readme = tmp_path / "README.md"
    readme.write_text(
        "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("catalogue", "matrix", "pairs")),
        encoding="utf-8",
    )
    with pytest.raises(conformance.typer.Exit):
        conformance.main(check=readme)
    assert "stale" in capsys.readouterr().err
    conformance.main(write=readme)
    assert part(readme.read_text(encoding="utf-8"), "catalogue") == catalogue()
    conformance.main(check=readme)
    with pytest.raises(hfpos.PatchError, match="leave the model types out"):
        conformance.main(["llama"], write=readme)
    with pytest.raises(hfpos.PatchError, match="did you mean 'llama'"):
        conformance.main(["lama"])


def _rows(labels, names):
    return [Row(name, cells=dict.fromkeys(labels, Cell("works"))) for name in names]
