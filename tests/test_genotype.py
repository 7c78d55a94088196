"""Genotypes: validation, round trips through files, and a text reader that no text can break."""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darts_space.cell import PRIMITIVES, node_rows
from darts_space.genotype import GENOTYPES, Genotype, random_genotype, read_genotype

GOLDEN = json.loads((Path(__file__).parent / "golden" / "genotypes.json").read_text())
PUBLISHED = GENOTYPES["PC_DARTS_cifar"]
TEXT = PUBLISHED.to_text()
genotypes = st.integers(0, 2**32).map(lambda seed: random_genotype(np.random.default_rng(seed)))


def with_edge(position: int, edge: object) -> list:
    return [*PUBLISHED.normal[:position], edge, *PUBLISHED.normal[position + 1 :]]


def with_normal(normal: object) -> Genotype:
    return Genotype(normal, (2, 3, 4, 5), PUBLISHED.reduce, (2, 3, 4, 5))


def test_primitives_and_published_genotypes_are_the_golden_ones():
    assert list(PRIMITIVES) == GOLDEN["primitives"]
    assert set(GENOTYPES) == set(GOLDEN["genotypes"])
    for name, fields in GOLDEN["genotypes"].items():
        assert GENOTYPES[name] == Genotype(**fields)


def test_node_rows_enumerate_the_edges():
    golden = json.loads((Path(__file__).parent / "golden" / "genotype_parse.json").read_text())["edge_rows"]
    rows = [(row, node, state) for node in range(4) for state, row in enumerate(node_rows(node))]
    assert rows == [(edge["row"], edge["node"], edge["from_state"]) for edge in golden]


@pytest.mark.parametrize(
    ("normal", "message"),
    [
        (PUBLISHED.normal[:7], "needs 8 .* has 7"),
        (None, "needs 8 .* None"),
        ("sep_conv", "needs 8"),
        (with_edge(3, ("sep_conv_7x7", 1)), "Edge 3 .* 'sep_conv_7x7', which is unknown; use one of"),
        (with_edge(3, ("none", 1)), "Edge 3 .*'none', which is never part"),
        (with_edge(3, (["sep_conv_3x3"], 1)), "Edge 3 .* unknown"),
        (with_edge(3, ("sep_conv_3x3", 3)), "Edge 3 .* input 3; use an integer from 0 to 2"),
        (with_edge(0, ("sep_conv_3x3", 2)), "Edge 0 .* from 0 to 1"),
        (with_edge(3, ("sep_conv_3x3", -1)), "input -1"),
        (with_edge(3, ("sep_conv_3x3", True)), "input True"),
        (with_edge(3, ("sep_conv_3x3", 1.0)), r"input 1\.0"),
        (with_edge(3, ("sep_conv_3x3", "1")), "input '1'"),
        (with_edge(3, ("sep_conv_3x3", 0)), "Edge 3 .* two distinct inputs"),
        (with_edge(3, ("sep_conv_3x3",)), "write it as"),
        (with_edge(3, 5), "Edge 3 .* is 5"),
    ],
)
def test_an_invalid_cell_is_refused_by_name(normal, message):
    with pytest.raises(ValueError, match=message):
        with_normal(normal)
    with pytest.raises(ValueError, match="reduce"):
        Genotype(PUBLISHED.normal, (2, 3, 4, 5), normal, (2, 3, 4, 5))


@pytest.mark.parametrize("concat", [(), (2, 3, 4), (2, 3, 4, 6), (5, 4, 3, 2), (2, 3, 4, 5, 6), None, 4, "2345"])
def test_an_invalid_concat_is_refused(concat):
    with pytest.raises(ValueError, match=r"reduce_concat is .* must be \(2, 3, 4, 5\)"):
        Genotype(PUBLISHED.normal, range(2, 6), PUBLISHED.reduce, concat)


def test_lists_become_tuples_so_that_a_genotype_is_a_value():
    lists = Genotype([list(e) for e in PUBLISHED.normal], [2, 3, 4, 5], list(PUBLISHED.reduce), range(2, 6))
    assert lists == PUBLISHED and hash(lists) == hash(PUBLISHED)
    assert lists.normal[0] == ("sep_conv_3x3", 1) and lists.normal_concat == (2, 3, 4, 5)
    with pytest.raises(AttributeError):
        lists.normal = ()


@settings(max_examples=50, deadline=None)
@given(genotypes)
def test_every_form_reads_back_as_the_same_genotype(genotype):
    assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype
    assert Genotype.from_text(genotype.to_text()) == genotype
    assert read_genotype(genotype.to_text()) == read_genotype(json.dumps(genotype.to_json())) == genotype


def test_a_file_reads_back_and_has_the_same_bytes_every_time(tmp_path):
    provenance = {"seed": 0, "inputs": {"proxy.json": "ab12"}, "ä": [1, None, "line\nbreak"]}
    PUBLISHED.save(tmp_path / "one.json", provenance)
    PUBLISHED.save(str(tmp_path / "two.json"), dict(reversed(provenance.items())))
    content = (tmp_path / "one.json").read_bytes()
    assert content == (tmp_path / "two.json").read_bytes()
    assert json.loads(content) == {**PUBLISHED.to_json(), "provenance": provenance}
    assert b'\n    ["sep_conv_3x3", 1], ["skip_connect", 0],\n' in content, "one node per line"
    assert Genotype.load(tmp_path / "one.json") == read_genotype(str(tmp_path / "two.json")) == PUBLISHED
    assert sorted(os.listdir(tmp_path)) == ["one.json", "two.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "genotype.json"
    PUBLISHED.save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="No space"):
        GENOTYPES["DARTS_V1"].save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["genotype.json"]


@pytest.mark.parametrize("provenance", [[1], {"x": object()}, {"x": float("nan")}])
def test_provenance_must_be_a_json_object(tmp_path, provenance):
    with pytest.raises(ValueError, match="provenance"):
        PUBLISHED.save(tmp_path / "genotype.json", provenance)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must have format"),
        ({"version": 2}, "version 1, but has .*2"),
        ({"normal": None}, "normal cell"),
        ({"extra": 1}, "unknown keys .*extra"),
        ({"provenance": "me"}, "provenance"),
        ({"reduce_concat": [2, 3]}, "reduce_concat"),
    ],
)
def test_json_of_another_schema_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Genotype.from_json({**PUBLISHED.to_json(), **change})


@pytest.mark.parametrize("key", ["format", "version", "normal", "normal_concat", "reduce", "reduce_concat"])
def test_json_that_lacks_a_key_is_refused(key):
    document = {k: v for k, v in PUBLISHED.to_json().items() if k != key}
    with pytest.raises(ValueError, match=key):
        Genotype.from_json(document)


@pytest.mark.parametrize(
    "text",
    [
        f"PC_DARTS = {TEXT}",
        f"\n  {TEXT}  # found on CIFAR-10\n",
        TEXT.replace("range(2, 6)", "[2, 3, 4, 5]"),
        TEXT.replace("normal=", "").replace("normal_concat=", ""),
        f"Genotype({list(PUBLISHED.normal)}, range(2, 6), {PUBLISHED.reduce}, [2, 3, 4, 5])",
        TEXT.replace(", (", ",\n    ("),
    ],
)
def test_legacy_text_is_read_in_all_its_forms(text, tmp_path):
    assert Genotype.from_text(text) == PUBLISHED
    (tmp_path / "genotype.txt").write_text(text)
    assert Genotype.load(tmp_path / "genotype.txt") == PUBLISHED


def nested(edges):
    return [list(edges[i : i + 2]) for i in range(0, 8, 2)]


FIELDS = {name: getattr(PUBLISHED, name) for name in ("normal", "normal_concat", "reduce", "reduce_concat")}
AS_PEOPLE_HAVE_IT = {
    "a line of a log": f"2026-11-26 05:04:07,123 INFO genotype = {TEXT}",
    "a step": TEXT.replace("range(2, 6)", "range(2, 6, 1)"),
    "a list of a range": TEXT.replace("range(2, 6)", "list(range(2, 6))"),
    "nested by node": TEXT.replace(str(list(PUBLISHED.normal)), str(nested(PUBLISHED.normal))),
    "integers of numpy 2": re.sub(r", (\d)\)", r", np.int64(\1))", TEXT).replace(
        "range(2, np.int64(6))", "range(2, 6)"
    ),
    "a module": f"import x\nbest = x.{TEXT}\nprint(best)\n",
    "the same twice": f"epoch 48\n{TEXT}\nepoch 49\n{TEXT}\n",
    "what search.py prints": f"{PUBLISHED.to_text()}\ngenotype     runs/a (b)/genotype.json\ncost 3 s (scorer 1 s)\n",
    "definitions beside it": f"Genotype = namedtuple('Genotype', 'normal normal_concat')\nA = {TEXT}\n",
    "a JSON object of the fields": json.dumps(FIELDS),
    "a JSON object, nested": json.dumps({**FIELDS, "normal": nested(PUBLISHED.normal)}),
    "a line of genotypes.jsonl": json.dumps({"step": 3, "entropy": 0.5, "genotype": PUBLISHED.to_json()}),
    "equal lines of genotypes.jsonl": 2 * (json.dumps({"step": 3, "genotype": PUBLISHED.to_json()}) + "\n"),
    "a result of train_eval.py": json.dumps({"network": {"kind": "cifar", "genotype": PUBLISHED.to_json()}}),
}


@pytest.mark.parametrize("form", AS_PEOPLE_HAVE_IT)
def test_the_genotype_in_the_forms_that_people_have(form, tmp_path):
    text = AS_PEOPLE_HAVE_IT[form]
    assert read_genotype(text) == PUBLISHED
    (tmp_path / "file").write_text(text)
    assert read_genotype(str(tmp_path / "file")) == PUBLISHED


def test_numbers_and_nesting_of_other_libraries_are_plain_in_a_genotype():
    edges = [(operation, np.int64(source)) for operation, source in PUBLISHED.normal]
    found = Genotype(nested(edges), np.arange(2, 6).tolist(), PUBLISHED.reduce, range(2, 6))
    assert found == PUBLISHED and all(type(source) is int for _, source in found.normal)
    with pytest.raises(ValueError, match="Edge 0 of the normal cell"):
        Genotype([("skip_connect", True), *PUBLISHED.normal[1:]], (2, 3, 4, 5), PUBLISHED.reduce, (2, 3, 4, 5))


def test_several_genotypes_are_a_question():
    others = [GENOTYPES[name] for name in ("DARTS_V1", "DARTS_V2")]
    text = "\n".join(f"{name} = {one.to_text()}" for name, one in zip(("FIRST", "SECOND"), others, strict=True))
    with pytest.raises(ValueError, match=r"2 genotypes: FIRST \(line 1\), SECOND \(line 2\). Which one\?"):
        read_genotype(text)
    with pytest.raises(ValueError, match=r"2 genotypes: genotype 1, genotype 2. Which one\?"):
        read_genotype("\n".join(json.dumps({"genotype": one.to_json()}) for one in others))


@pytest.mark.parametrize("spoil", [lambda text: text.replace("sep_conv_3x3", "sep_conv3x3"), lambda text: text[:-9]])
def test_one_that_cannot_be_read_is_not_passed_over(spoil):
    text = f"FIRST = {PUBLISHED.to_text()}\nMINE = {spoil(PUBLISHED.to_text())}"
    with pytest.raises(ValueError, match=r"MINE \(line 2\)"):
        read_genotype(text)


def test_a_run_folder_and_the_names_of_the_published_code(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"holds no genotype\.json; name a run folder"):
        read_genotype(str(tmp_path))
    PUBLISHED.save(tmp_path / "genotype.json")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert read_genotype(str(tmp_path)) == read_genotype(f"~/{tmp_path.name}") == PUBLISHED
    assert read_genotype("PCDARTS") is GENOTYPES["PC_DARTS_cifar"]
    assert read_genotype("DARTS") is GENOTYPES["DARTS_V2"]


HOSTILE_TEXTS = {
    "call": TEXT.replace("'sep_conv_3x3'", "open('stolen', 'w')", 1),
    "call as an argument": "Genotype(__import__('os').mkdir('stolen'), [2], [], [2])",
    "another function": TEXT.replace("Genotype", "print"),
    "a method": TEXT.replace("Genotype(", "x.Genotype("),
    "unknown name": TEXT.replace("0)", "x)", 1),
    "power in a range": TEXT.replace("range(2, 6)", "range(0, 10**12)"),
    "long range": TEXT.replace("range(2, 6)", "range(0, 1000000000000)"),
    "range with a step of nothing": TEXT.replace("range(2, 6)", "range(2, 6, 0)"),
    "range backwards": TEXT.replace("range(2, 6)", "range(2, -10**12, -1)"),
    "a method that looks like numpy": TEXT.replace("0)", "np.load(0))", 1),
    "range by keyword": TEXT.replace("range(2, 6)", "range(stop=6)"),
    "starred": "Genotype(*x)",
    "double starred": "Genotype(**{'normal': 1})",
    "twice the same": TEXT[:-1] + ", normal=[])",
    "positional and by name": TEXT.replace("Genotype(", "Genotype([], "),
    "too many": "Genotype(1, 2, 3, 4, 5)",
    "too few": "Genotype(1, 2)",
    "two statements": f"{TEXT}; {TEXT}",
    "not a statement": "Genotype(normal=",
    "an import": "import os",
    "nothing": "",
    "null byte": "Genotype(\0)",
    "surrogate": "Genotype('\ud800')",
    "brackets": "Genotype(" + "[" * 8000,
    "nested lists": "Genotype(" + "[" * 190 + "]" * 190 + ", 1, 2, 3)",
    "minus signs": "Genotype(" + "-" * 8000 + "1, 1, 2, 3)",
    "sum": "Genotype(" + "1+" * 4000 + "1, 1, 2, 3)",
    "sum that the parser bears": "Genotype(" + "1+" * 300 + "1, 1, 2, 3)",
    "attributes": "x" + ".x" * 4000,
    "nots": "not " * 2000 + "1",
    "lambdas": "lambda:" * 1100 + "1",
    "long number": "Genotype(" + "9" * 8000 + ", 1, 2, 3)",
    "long text": f"{TEXT}  # {'x' * 10_000}",
    "formatted string": TEXT.replace("'sep_conv_3x3'", "f'{1}'", 1),
}


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_hostile_text_is_refused_and_never_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="enotype"):
        Genotype.from_text(HOSTILE_TEXTS[name])
    assert os.listdir(tmp_path) == [], "nothing was executed"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_text_gives_a_genotype_or_a_value_error(data):
    start = data.draw(st.integers(0, len(TEXT)))
    stop = data.draw(st.integers(start, min(len(TEXT), start + 20)))
    text = TEXT[:start] + data.draw(st.text(alphabet="()[]',= 019abx_*-.:{}\n", max_size=8)) + TEXT[stop:]
    try:
        assert isinstance(Genotype.from_text(text), Genotype)
    except ValueError as error:
        assert str(error).endswith((".", ")")) and len(str(error)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "darts_space/genotype", "ver', "not valid JSON"),
        (b"[" * 100_000, "genotype text has"),
        (b'{"a":' * 100_000, "JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b" " * (1 << 20) + b"{", "larger than 1 MiB"),
        (b"{}", "must have format"),
        (TEXT.replace("range", "eval").encode(), "has a Call at line 1"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Genotype.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(ValueError, match="Cannot read the genotype file") as caught:
            Genotype.load(path)
        assert str(path) in str(caught.value)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    PUBLISHED.save(tmp_path / "genotype.json")
    path = tmp_path / "windows.json"
    path.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "genotype.json").read_bytes())
    assert Genotype.load(path) == PUBLISHED


def test_read_genotype_knows_published_names_and_says_what_it_takes():
    assert read_genotype("DARTS_V2") is GENOTYPES["DARTS_V2"]
    for source in ("DARTS_V9", "", "x" * 100_000, "a\0b"):
        with pytest.raises(ValueError, match="neither a genotype file nor one of PC_DARTS_cifar"):
            read_genotype(source)


def test_random_genotypes_are_uniform_over_operations_and_pairs():
    rng = np.random.default_rng(0)
    draws = [random_genotype(rng) for _ in range(2000)]
    for cell, node in itertools.product(("normal", "reduce"), range(4)):
        edges = [getattr(genotype, cell)[2 * node : 2 * node + 2] for genotype in draws]
        pairs = Counter((first[1], second[1]) for first, second in edges)
        assert set(pairs) == set(itertools.combinations(range(2 + node), 2)), "every pair occurs, lower input first"
        operations = Counter(operation for pair in edges for operation, _ in pair)
        assert set(operations) == set(PRIMITIVES) - {"none"}
        for counts in (pairs, operations):
            expected = counts.total() / len(counts)
            assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_random_genotypes_follow_their_generator():
    assert random_genotype(np.random.default_rng(3)) == random_genotype(np.random.default_rng(3))
    assert random_genotype(np.random.default_rng(3)) != random_genotype(np.random.default_rng(4))


def test_skip_connections_are_counted_by_cell():
    counts = {name: genotype.skip_connections() for name, genotype in GENOTYPES.items()}
    assert counts == {
        "PC_DARTS_cifar": (1, 0),
        "PC_DARTS_image": (2, 1),
        "DARTS_V1": (3, 3),
        "DARTS_V2": (2, 3),
    }


def test_pools_are_counted_by_cell():
    counts = {name: genotype.pools() for name, genotype in GENOTYPES.items()}
    assert counts == {"PC_DARTS_cifar": (1, 1), "PC_DARTS_image": (0, 1), "DARTS_V1": (0, 5), "DARTS_V2": (0, 5)}


@pytest.mark.parametrize(("operations", "limit"), [(["skip_connect"], 4), (["max_pool_3x3", "avg_pool_3x3"], 5)])
def test_too_many_operations_without_weights_in_the_normal_cell_are_a_collapse(operations, limit):
    for count in range(9):
        names = [operations[i % len(operations)] if i < count else "sep_conv_3x3" for i in range(8)]
        genotype = with_normal([(name, i % 2) for i, name in enumerate(names)])
        assert genotype.collapsed == (count >= limit)
        assert not replace(genotype, reduce=genotype.normal, normal=genotype.reduce).collapsed


@settings(max_examples=50, deadline=None)
@given(genotypes, genotypes)
def test_shared_edges_count_common_entries_whatever_their_order(one, other):
    expected = 0
    for cell, position, second in itertools.product(("normal", "reduce"), range(8), range(2)):
        expected += getattr(one, cell)[position] == getattr(other, cell)[2 * (position // 2) + second]
    assert one.shared_edges(other) == other.shared_edges(one) == expected
    swapped = [one.normal[position ^ 1] for position in range(8)]
    assert one.shared_edges(Genotype(swapped, range(2, 6), one.reduce, range(2, 6))) == 16


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_file_that_a_shell_wrote_is_read(encoding, tmp_path):
    """PowerShell redirects in UTF-16, with a mark."""
    genotype = GENOTYPES["DARTS_V1"]
    text = genotype.to_text() if encoding != "utf-16-le" else "\ufeff" + genotype.to_text()
    (tmp_path / "genotype.txt").write_bytes(text.encode(encoding))
    assert Genotype.load(tmp_path / "genotype.txt") == genotype
