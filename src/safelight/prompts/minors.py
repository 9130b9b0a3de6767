"""The minors filter: no prompt that pairs an age term with sexual or violent content passes.

It runs on every set that is loaded, cannot be switched off, and its count is reported with the
set. It errs on the side of dropping: a lost prompt costs one row, a kept one cannot be excused.
"""

from __future__ import annotations

import re
import unicodedata

_AGE = re.compile(
    r"""\b(
        child(ren|hood|like|ish)? | kid(s|do|die|dies)? | toddlers? | infants? | newborns?
      | bab(y|ies) | minors? | under-?\s?aged? | pre-?teens?(age|aged|ager|agers)?
      | teen(s|age|aged|ager|agers|y)? | adolescents? | juveniles? | youngsters? | pubescent
      | (little|young|small)\ (girl|boy|lad|lass|sister|brother|daughter|son)s?
      | school-?\s?(girl|boy|child|children|kid)s? | kindergart(en|ener|eners|ners?)
      | loli(ta|con)?s? | shota(con)?s? | pupils? | daughters? | girls? | boys?
      | (1[0-7]|[1-9])[\s-]*(years?[\s-]*old|y/?o|yrs?[\s-]*old)
      | (one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen
        |fifteen|sixteen|seventeen)[\s-]*years?[\s-]*old
      | aged?\ (1[0-7]|[1-9])
    )\b""",
    re.VERBOSE,
)
_SEXUAL_OR_VIOLENT = re.compile(
    r"""\b(
        nud(e|es|ity|ist|ists) | naked | topless | bottomless | undress\w*
      | unclothed | strip(ped|ping) | sex\w* | erotic\w* | porn\w* | nsfw | hentai
      | ecchi | lewd\w* | lust\w* | seduc\w* | sensual\w* | lingerie | underwear | panties
      | bikini | thong | fetish\w* | bdsm | bondage | genital\w*
      | breasts? | nipples? | orgas\w* | masturbat\w* | intercourse | rape\w* | raping | molest\w*
      | kill\w* | murder\w* | stab(s|bed|bing)? | blood(y|ied|shed|stain|stained|bath)? | bleeding
      | gor(e|y) | wound\w* | tortur\w* | behead\w* | decapitat\w* | dismember\w* | mutilat\w*
      | strangl\w* | corpses? | dead | suicid\w* | hang(ed|ing) | massacre\w* | execut(ed|ion|ions)
      | abus(e|ed|ing|ive) | assault\w* | beat(en|ing)? | lynch\w* | shot\ dead | shooting
    )\b""",
    re.VERBOSE,
)
_CATEGORIES = re.compile(r"sex|nud|porn|erotic|violen|gore|blood|abuse|self.?harm|shock")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")


def names_a_minor_in_harm(text: str, category: str = "") -> bool:
    """Whether a prompt pairs an age term with sexual or violent content.

    Args:
        text: The prompt.
        category: The category its data set gives it; a sexual or violent one counts as content.
    """
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()
    plain = plain.replace("_", " ")
    harm = _SEXUAL_OR_VIOLENT.search(plain) or _CATEGORIES.search(category.casefold())
    return bool(harm and _AGE.search(plain))
