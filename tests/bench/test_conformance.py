"""The sweep's own code on a few models, and the table it wrote into the README."""

from pathlib import Path

import pytest
import torch

import hfpos
from hfpos.bench import examine as examining
from hfpos.bench import probes
from hfpos.bench.examine import Cell, Row, examine, longest_input, random_ids, try_seam
from hfpos.bench.matrix import part, replace_part, summary, table
from hfpos.bench.oracle import alibi_logits, nope_logits
from hfpos.bench.shrink import PARAMETER_LIMIT, TRAINED_LENGTH, causal_lm_classes
from tests.tiny import tiny


README = Path(__file__).parents[2] / "README.md"
FAMILIES = [
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "gpt_neox",
        "gpt2",
        "bloom",
    ),
    *("cohere", "glm", "phi", "stablelm", "starcoder2", "granite", "smollm3", "gpt_oss"),
]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tiny_models_are_small_seeded_and_without_defaults(model_type):
    model = tiny(model_type)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < PARAMETER_LIMIT / 10
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name and parameter.dim() == 1]
    assert all(norm.std() > 0.1 for norm in norms)
    ids = longest_input(model)
    assert torch.equal(probes.logits(model, ids), probes.logits(tiny(model_type), ids))


def test_overrides_reach_the_config():
    assert tiny("llama", num_key_value_heads=1).model.layers[0].self_attn.k_proj.out_features == 16


def test_gemma3_keeps_its_nested_rotary_parameters_and_both_kinds_of_layers():
    config = tiny("gemma3_text").config
    assert sorted(config.layer_types) == ["full_attention", "sliding_attention"]
    assert set(config.rope_parameters) == {"full_attention", "sliding_attention"}


def test_every_class_has_one_row():
    classes = causal_lm_classes()
    assert len(classes) > 150
    assert len(set(classes.values())) == len(classes)


@pytest.mark.parametrize(
    ("model_type", "rope", "expected"),
    [
        ("llama", True, {"freq": "works", "bias": "works", "score": "works", "embed": "works", "nope": "works"}),
        ("gpt2", False, {"freq": "works", "bias": "works", "score": "works", "embed": "works", "nope": "works"}),
        ("mamba", False, dict.fromkeys(("freq", "bias", "score", "embed", "nope"), "refused")),
    ],
)
def test_examine(model_type, rope, expected):
    row = examine(model_type)
    assert not row.problem
    assert row.rope is rope
    assert {seam: cell.status for seam, cell in row.cells.items()} == expected, row.cells


def test_a_class_that_cannot_be_built_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setattr("hfpos.bench.shrink.PARAMETER_LIMIT", 10)
    row = examine("llama")
    assert "parameters left" in row.problem
    assert not row.cells


@pytest.mark.parametrize("probe", examining.PROBES)
def test_probes_hold_on_a_stock_llama(probe):
    assert probe(tiny("llama"), random_ids()) is None


def test_probes_notice_what_is_wrong():
    gpt2 = tiny("gpt2")
    assert "largest logit" in probes.left_padding(gpt2, longest_input(gpt2)), "stock GPT-2 shifts a padded row"
    assert probes.decoding(tiny("bert", is_decoder=False), random_ids()[:, :TRAINED_LENGTH]) == "returns no cache"
    poisoned = tiny("llama")
    torch.nn.init.constant_(poisoned.lm_head.weight, float("nan"))
    assert probes.finite(poisoned, random_ids()) == "logits are not finite"
    assert probes.gradients(poisoned, random_ids()) == "gradients are not finite"


def test_oracles_leave_the_model_as_it_was():
    model, ids = tiny("gpt_oss"), random_ids()
    before = probes.logits(model, ids)
    assert probes.difference(nope_logits(model, ids), before) > probes.TOLERANCE
    assert probes.difference(alibi_logits(model, ids, factor=1.0), before) > probes.TOLERANCE
    assert torch.equal(probes.logits(model, ids), before)


def test_a_patch_that_does_nothing_fails(monkeypatch):
    monkeypatch.setattr(hfpos, "patch", lambda model, *args, **kwargs: model)
    cell = try_seam(tiny("llama"), "freq", random_ids())
    assert cell == Cell("fails", "silent: the logits do not move")


def test_a_patch_that_does_something_else_fails(monkeypatch):
    patch = hfpos.patch
    monkeypatch.setattr(hfpos, "patch", lambda model, *args, **kwargs: patch(model, "linear", factor=2))
    cell = try_seam(tiny("llama"), "bias", random_ids())
    assert cell.status == "fails"
    assert "from what the scheme should give" in cell.note


def test_a_refusal_that_changes_the_model_fails(monkeypatch):
    def half_done(model, *args, **kwargs):
        torch.nn.init.zeros_(model.lm_head.weight)
        raise hfpos.PatchError("no")

    monkeypatch.setattr(hfpos, "patch", half_done)
    assert try_seam(tiny("llama"), "freq", random_ids()) == Cell("fails", "refused, yet the model is changed")


def test_table_groups_equal_outcomes_and_explains_the_rest():
    rows = [
        Row("llama", rope=True, cells={"freq": Cell("works"), "bias": Cell("works")}),
        Row("qwen3", rope=True, cells={"freq": Cell("works"), "bias": Cell("works")}, skipped=["decoding"]),
        Row("bert", cells={"freq": Cell("refused", "BertLMHeadModel has | no RoPE"), "bias": Cell("fails", "off")}),
        Row("blt", problem="needs a friend"),
    ]
    text = table(rows)
    assert "| llama, qwen3 (2) | yes | works | works |" in text
    assert "| bert (1) | no | refused | fails |" in text
    assert "- `freq` refused: the model has / no RoPE: bert (1)" in text
    assert "decoding of qwen3 (1)" in text
    assert "could not be built small: blt: needs a friend" in text
    assert "3 of 4" in summary(rows)
    assert "Failures: 1." in summary(rows)


def test_table_goes_between_the_markers_only():
    text = "head\n<!-- matrix:begin -->\nold\n<!-- matrix:end -->\ntail"
    assert replace_part(text, "matrix", "new") == text.replace("old", "new")
    assert part(text, "matrix") == "old"
    for broken in ("no markers", text.replace("matrix:end", "pairs:end")):
        with pytest.raises(hfpos.PatchError, match="add them"):
            replace_part(broken, "matrix", "new")


def test_readme_table_parses_and_meets_the_goals():
    body = part(README.read_text(encoding="utf-8"), "matrix")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")
    ]
    header, _, *rows = lines
    assert header == ["model types", "RoPE", *examining.SEAMS]
    assert all(len(row) == len(header) for row in rows)
    cells = {cell for row in rows for cell in row[2:]}
    assert cells <= {"works", "refused"}, "a failure is a bug: `make matrix` prints where"

    def share(seam, among):
        counts = {row[0]: int(row[0].rsplit("(", 1)[1].rstrip(")")) for row in among}
        works = sum(counts[row[0]] for row in among if row[header.index(seam)] == "works")
        return works / sum(counts.values())

    assert share("freq", [row for row in rows if row[1] == "yes"]) >= 0.9
    assert share("bias", rows) >= 0.6
