"""OpenAI's prompts for sets whose layout brings none, by the key of the task; {c} stands for the class name.

From openai/CLIP, data/prompts.md; ImageNet's 80 come with open_clip. The order of a set's prompts does not matter: a
class is the mean of its prompts' embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable

from open_clip import OPENAI_IMAGENET_TEMPLATES

SIMPLE = ("a photo of a {c}.",)
IMAGENET = tuple(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES)


def _each(prompt: str, *choices: Iterable[str]) -> tuple[str, ...]:
    """`prompt` with every choice in place of its first _, then of the next one."""
    prompts = [prompt]
    for words in choices:
        prompts = [text.replace("_", word, 1) for text in prompts for word in words]
    return tuple(prompts)


_ARTICLES = ("a", "the")
_KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_CIFAR = _each("a _photo of _ {c}.", _KINDS, _ARTICLES)
_CIFAR += _each("a photo of _ _ {c}.", _ARTICLES, ("small", "big"))
_SHOWN = ("photo", "video", "example", "demonstration")
_ACTING = ("", "using ", "doing ", "during ", "performing ", "practicing ")
_VISITED = (
    "i took in",
    "i took while visiting",
    "from my home country of",
    "from my visit to",
    "showing the country of",
)
_OWNERS = ("a", "the", "my", "my dirty", "my clean", "my new", "my old")

PROMPTS: dict[str, tuple[str, ...]] = {
    "imagenet1k": IMAGENET,
    "birdsnap": ("a photo of a {c}, a type of bird.",),
    "cars": (*_each("a photo of _ {c}.", _OWNERS), "i love my {c}!"),
    "cifar10": _CIFAR,
    "country211": _each("a photo _ {c}.", _VISITED),
    "fgvc_aircraft": _each("a photo of _ {c}, a type of aircraft.", _ARTICLES),
    "food101": ("a photo of {c}, a type of food.",),
    "gtsrb": _each('a _ photo of a "{c}" traffic sign.', ("zoomed in", "centered", "close up")),
    "mnist": ('a photo of the number: "{c}".',),
    "renderedsst2": ("a {c} review of a movie.",),
    "stl10": _each("a photo of _ {c}.", _ARTICLES),
    "ucf101": _each("a _ of _ person _{c}.", _SHOWN, _ARTICLES, _ACTING),
    "vtab/cifar100": _CIFAR,
    "vtab/dtd": _each("a photo of _ {c} _.", _ARTICLES, ("texture", "pattern", "thing", "object")),
    "vtab/eurosat": _each("a centered satellite photo of _{c}.", ("", "a ", "the ")),
    "vtab/flowers": ("a photo of a {c}, a type of flower.",),
    "vtab/pets": ("a photo of a {c}, a type of pet.",),
    "vtab/svhn": ('a photo of the number: "{c}".',),
}
