"use strict";
// Keeps a page up to date: asks for it again every second and takes over what has changed.

const PERIOD_MS = 1000;
const PATIENCE_MS = 15000; // a consumer may ask its maker first
const NEWS_MS = 15000; // a screen reader is told no more often
const MOST_ARRIVALS = 5; // more at once are not animated

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [0, "s"]];

const [list, state, news, pause] = ["list", "state", "news", "pause"].map((id) => document.getElementById(id));
const canHover = matchMedia("(hover: hover)");
let isPaused = false;
let untold = 0;
let toldAt = Date.now();

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function isHovered(element) {
  return canHover.matches && element.matches(":hover");
}

function showAges() {
  for (const time of document.querySelectorAll("time.ago")) {
    const seconds = Math.max(0, (Date.now() - Date.parse(time.dateTime)) / 1000);
    const [size, unit] = UNITS.find(([size]) => seconds >= size);
    say(time, `${Math.floor(seconds / (size || 1))} ${unit} ago`);
  }
}

function takeOver(page) {
  for (const part of document.querySelectorAll("[data-live]")) {
    const fresh = page.getElementById(part.id);
    const isInUse = part.contains(document.activeElement) || (part.dataset.live === "still" && isHovered(part));
    if (!isInUse && part.innerHTML !== fresh.innerHTML) part.replaceChildren(...fresh.childNodes);
  }
  if (!list || list.matches(":focus-within") || isHovered(list)) return; // what one is about to open stays where it is
  const arrivals = [...page.getElementById("list").children].filter((card) => !document.getElementById(card.id));
  for (const card of [...list.children]) if (!page.getElementById(card.id)) card.remove();
  if (arrivals.length <= MOST_ARRIVALS) for (const card of arrivals) card.classList.add("arrival");
  list.prepend(...arrivals);
  tell(arrivals.length);
}

function tell(arrivals) {
  untold += arrivals;
  if (!untold || Date.now() - toldAt < NEWS_MS) return;
  say(news, `New widgets: ${list.children[0].querySelector("code").textContent} is the newest.`);
  untold = 0;
  toldAt = Date.now();
}

async function refresh() {
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store", signal });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    takeOver(new DOMParser().parseFromString(await answer.text(), "text/html"));
    say(state, "Live");
  } catch {
    say(state, state.dataset.lost);
  }
}

async function run() {
  if (!isPaused && !document.hidden) await refresh();
  showAges();
  setTimeout(run, PERIOD_MS);
}

pause.addEventListener("click", () => {
  isPaused = !isPaused;
  pause.textContent = isPaused ? "Go on" : "Pause";
  say(state, isPaused ? "Paused" : "Live");
});
pause.parentElement.hidden = false;
say(state, "Live");
setTimeout(run, PERIOD_MS);
