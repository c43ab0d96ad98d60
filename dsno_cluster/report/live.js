// A followed report: loads its newer version every few seconds, until the last, and keeps what the reader opened, moved and
// looks at.
const every = (selector) => [...document.querySelectorAll(selector)];
const FOCUSABLE = "a, summary, input, [tabindex]";
const seconds = document.body.dataset.reload; // undefined in the last version
// parts may be added: what is remembered has the name of its section, and its number there
const nameOf = (element) => {
  const section = element.closest("section");
  return `${section?.id ?? ""} ${element.localName} ${[...(section ?? document).querySelectorAll(element.localName)].indexOf(element)}`;
};
const topOf = (element) => element.getBoundingClientRect().top;

const kept = history.state;
history.scrollRestoration = "manual"; // what was added moves things
if (kept) {
  for (const details of every("details")) details.open = kept.open.includes(nameOf(details));
  for (const range of every(".compare input")) {
    range.value = kept.moved[nameOf(range)] ?? range.value;
    range.dispatchEvent(new Event("input"));
  }
  every(FOCUSABLE).find((element) => nameOf(element) === kept.focus)?.focus({ preventScroll: true });
  const section = document.getElementById(kept.section);
  if (section) scrollTo({ top: scrollY + topOf(section) - kept.top, behavior: "instant" });
}

let held = false;
addEventListener("pointerdown", () => { held = true; });
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => { held = false; });
const reload = () => {
  if (held || document.hidden || !getSelection().isCollapsed) return;
  const focused = document.activeElement;
  const seen = scrollY > 0 ? every("main > section").find((section) => section.getBoundingClientRect().bottom > 0) : null;
  history.replaceState({
    open: every("details[open]").map(nameOf),
    moved: Object.fromEntries(every(".compare input").map((range) => [nameOf(range), range.value])),
    focus: focused?.matches(FOCUSABLE) ? nameOf(focused) : null,
    section: seen?.id,
    top: seen && topOf(seen),
  }, "");
  location.reload();
};
if (seconds) {
  setInterval(reload, 1000 * seconds);
} else {
  history.replaceState(null, "");
  addEventListener("pagehide", () => { history.scrollRestoration = "auto"; });
}
