"""That a schedule's text is read as the tree of loops and branches that it is."""

import pytest

from bench import bundles

# In the form libtpu writes: a loop of two bundles around a branch that skips two, one of them empty and so
# without its depth, then another loop at the same depth.
TEXT = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = sld [smem:[#allocation1]] }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { %7 = sbr.rel (%p1) target = $region12 }
   0x3   : > { %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v0 ;; %9 = vst [vmem:[#allocation165_spill]] %v3 }
   0x4   :  {}
   0x5 PF: > { %s3 = smov 1 } /* Start/End empty region 12 */
   0x6 LB: > { %v2 = vmatmul.mubr.bf16.gmra.mxu1 %v0  ;;  %v4 = vmatmul.mubr.bf16.gmra.mxu0 %v0 }
   0x7 PF:  { %8 = sfence }
"""


def test_a_schedule_is_read_as_a_tree():
    root = bundles.parse(TEXT)
    assert (root.bundles, root.total()) == (2, 8)
    first, second = root.inner
    assert [first.kind, second.kind] == ["loop", "loop"]
    assert (first.bundles, first.total(), second.total()) == (3, 5, 1)
    (branch,) = first.inner
    assert (branch.kind, branch.bundles, branch.products, branch.spills) == ("branch", 2, 1, 1)
    assert (root.total(lambda r: r.products), root.total(lambda r: r.spills), second.products) == (
        3,
        1,
        2,
    )


def test_a_scalar_that_is_spilled_is_no_vector():
    text = "     0   :  { %4 = sst [smem:[#allocation53_spill]] %s2 }\n"
    assert bundles.parse(text).spills == 0


def test_schedules_are_asked_for_before_libtpu_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--some_flag")
    maps = tmp_path / "maps"
    monkeypatch.setattr(bundles, "_MAPS", maps)
    maps.write_text("7f00-7f01 r-xp 0 00:00 1 /somewhere/libtpu/libtpu.so\n")
    with pytest.raises(RuntimeError, match="loaded already"):
        bundles.dumping(tmp_path)
    maps.write_text("7f00-7f01 r-xp 0 00:00 1 /somewhere/jaxlib/libjax_common.so\n")
    bundles.dumping(tmp_path)
    assert f"--some_flag --xla_jf_dump_to={tmp_path}" in bundles.os.environ["LIBTPU_INIT_ARGS"]
