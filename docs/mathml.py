"""A Markdown extension of the site: formulas in TeX become MathML, typeset by browsers without scripts or network."""

from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from typing_extensions import override


class _Formulas(Treeprocessor):
    @override
    def run(self, root: Element) -> None:
        for parent in root.iter():
            for index, child in enumerate(list(parent)):
                if child.get("class") != "arithmatex":
                    continue
                source = "".join(child.itertext()).strip()
                display = "block" if source.startswith("\\[") else "inline"
                formula = convert_to_element(source[2:-2], display=display)
                formula.attrib.pop("xmlns", None)  # HTML knows the element
                formula.tail = child.tail
                parent[index] = formula


class FormulaExtension(Extension):
    """Converts what `pymdownx.arithmatex` (`generic: true`) has found."""

    @override
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Formulas(md), "mathml", priority=-10)


def makeExtension(**options: object) -> FormulaExtension:  # noqa: N802 (the name that Markdown calls)
    """The extension, as Python-Markdown asks for it."""
    return FormulaExtension(**options)
