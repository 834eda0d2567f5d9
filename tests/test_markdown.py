"""Markdown tables, as GitHub reads them."""

from __future__ import annotations

import re

from tffd_zoo.markdown import bullets, code, escaped, markdown_table


def test_words_stand_to_the_left_and_figures_to_the_right() -> None:
    assert markdown_table(["recipe", "top-1"], [["plain", "7.00"], ["tffd", "-12.50"]]).splitlines() == [
        "| recipe |  top-1 |",
        "| ------ | -----: |",
        "| plain  |   7.00 |",
        "| tffd   | -12.50 |",
    ]


def test_a_rule_has_three_dashes_however_narrow_its_column() -> None:
    # GitHub takes no rule that is a lone colon, and some renderers none of fewer than three dashes
    rule = markdown_table(["n", "x", "of"], [["1", "a", "2"]]).splitlines()[1]
    assert [cell.strip() for cell in rule.strip("|").split("|")] == ["---:", "---", "---:"]
    assert all(re.fullmatch(r"-{3,}:?", cell.strip()) for cell in rule.strip("|").split("|"))


def test_a_list_has_an_item_a_line() -> None:
    assert bullets(["one", "two"]) == "- one\n- two"


def test_a_name_from_elsewhere_is_shown_and_not_obeyed() -> None:
    assert escaped("uoft-cs/cifar100, my_birds (2024)") == "uoft-cs/cifar100, my_birds (2024)"
    assert escaped("a|b <b>x</b> [y](z)\n# `c`") == r"a\|b \<b\>x\</b\> \[y\](z) # \`c\`"
    assert escaped("_em_ and *strong*") == r"\_em\_ and \*strong\*"
    assert code("a`|\x1b[2Jb") == "`a [2Jb`"
