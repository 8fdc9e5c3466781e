"""How far text stands out from its ground in a page, by the formula of WCAG 2.2."""

from tests.loadtest.browser import Browser

#: Every text that is in sight with its contrast, if that is less than WCAG's AA: 4.5 to 1, 3 to 1 for large text.
#: Colours that let something through are mixed with what is under them (https://www.w3.org/TR/WCAG22/#contrast-minimum).
_FAINT = """(() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[0-9.]+/g).map(Number); return [r, g, b, a]; };
  const mix = ([r, g, b, a], under) => [r, g, b].map((one, i) => one * a + under[i] * (1 - a));
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    return layers.reverse().reduce((under, one) => mix(one, under), dark ? [18, 18, 18] : [255, 255, 255]);
  };
  const light = (colour) => colour.map((one) => one / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const own = (element) => [...element.childNodes].filter((each) => each.nodeType === 3)
    .map((each) => each.data).join("").trim();
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = own(element), style = getComputedStyle(element);
    if (!text || !element.getClientRects().length) continue;
    const under = ground(element), paint = element instanceof SVGElement ? style.fill : style.color;
    const ink = mix(parse(paint), under), [high, low] = [light(ink), light(under)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < (large ? 3 : 4.5)) found.push(`${contrast.toFixed(2)}: ${element.tagName} ${text.slice(0, 40)}`);
  }
  return found;
})()"""


def find_faint_text(page: Browser) -> list[str]:
    """The texts of the open page that do not stand out enough, with their contrast."""
    found: list[str] = page.value(_FAINT)
    return found
