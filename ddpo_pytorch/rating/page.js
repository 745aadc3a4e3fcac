"use strict";

const at = (id) => document.getElementById(id);
const fixed = document.body.dataset;
const WORDS = { 1: "poor", 2: "acceptable", 3: "excellent", skip: "skipped" };
const KEYS = { 1: "1", 2: "2", 3: "3", s: "skip", u: "undo", Backspace: "undo", z: "zoom" };
const images = new Map(); // id -> promise of a blob's address: this image and the next one
let who = null; // {rater, expert_level}
let state = null;
let busy = false; // a click is on its way
let seen = false; // the image is on the screen
let zoom = 1;

history.replaceState(null, "", "/"); // no token in the address bar

async function post(name, body) {
  let answer;
  try {
    answer = await fetch(`/api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The server does not answer, and the last click may not be saved. Is it still running? Then try again.");
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  const detail = typeof content.detail === "string" ? content.detail : `the server refused this (${answer.status})`;
  throw Object.assign(new Error(detail), { status: answer.status });
}

function load(id) {
  if (!images.has(id)) {
    const address = fetch(`/image/${id}`).then(async (answer) => {
      if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).detail || "The image did not arrive.");
      return URL.createObjectURL(await answer.blob());
    });
    address.catch(() => images.delete(id));
    images.set(id, address);
  }
  return images.get(id);
}

function tell(text) {
  at("alert").textContent = text;
}

function only(section) {
  for (const id of ["start", "ask", "done"]) at(id).hidden = id !== section;
}

async function show(next) {
  const before = state && state.current && state.current.id;
  state = next;
  at("who").hidden = false;
  at("name-shown").textContent = `Rating as ${who.rater}.`;
  at("leave").hidden = Boolean(fixed.rater && fixed.level);
  at("progress-text").textContent = `${state.rated} of ${state.total} rated`;
  at("progress").max = state.total;
  at("progress").value = state.rated;
  for (const button of document.querySelectorAll("[data-do=undo]")) button.setAttribute("aria-disabled", !state.undo);
  const wanted = [state.current, state.next].filter(Boolean).map((one) => one.id);
  for (const [id, address] of images) {
    if (!wanted.includes(id)) {
      images.delete(id);
      address.then(URL.revokeObjectURL, () => {});
    }
  }
  if (!state.current) return finish();
  only("ask");
  at("prompt").textContent = state.current.prompt;
  if (state.current.id === before && seen) return;
  await picture(state.current.id);
  if (state.next) load(state.next.id).catch(() => {});
}

async function picture(id) {
  const image = at("image");
  seen = false;
  image.classList.add("loading");
  enlarge(1);
  try {
    const address = await load(id);
    if (!state.current || state.current.id !== id) return;
    image.src = address;
    await image.decode();
    image.classList.remove("loading");
    seen = true;
  } catch (error) {
    tell(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
  }
}

function finish() {
  const put = state.skipped;
  at("thanks").textContent = put ? "Nearly done" : "Done, thank you";
  at("summary").textContent = put
    ? `You rated ${state.rated} of ${state.total} images and skipped ${put}. All ratings are saved.`
    : `You rated all ${state.total} images. Everything is saved; you can close this page.`;
  at("again").hidden = !put;
  only("done");
  at("thanks").focus();
}

async function act(action) {
  if (busy || !state) return;
  const rating = Number(action);
  if (action === "undo" && !state.undo) return;
  if ((rating || action === "skip") && !state.current) return;
  if (rating && !seen) return; // nobody rates what is not yet shown
  busy = true;
  tell("");
  flash(action);
  try {
    const about = { rater: who.rater };
    if (rating) Object.assign(about, { id: state.current.id, rating, expert_level: who.expert_level });
    if (action === "skip") about.id = state.current.id;
    if (action === "undo") about.undoable = state.undo; // so that a second try undoes nothing more
    const next = await post(rating ? "rate" : action, about);
    const done = WORDS[action];
    const undone = next.already ? "" : "Undone.";
    at("status").textContent = action === "undo" ? undone : done ? `${rating || ""} ${done}. Next image.` : "";
    await show(next);
    if (next.already && action === "undo") tell("You clicked elsewhere since, or this was undone already; nothing else was undone.");
    else if (next.already) tell("That image already had your rating, perhaps from another window; it was kept.");
  } catch (error) {
    tell(error.message);
    if (error.status === 404) await show(await post("state", { rater: who.rater })).catch(() => {});
  } finally {
    busy = false;
  }
}

function flash(action) {
  const button = document.querySelector(`#ask [data-do="${action}"]`);
  if (!button || button.offsetParent === null) return;
  button.classList.add("pressed");
  setTimeout(() => button.classList.remove("pressed"), 160);
}

/* zoom: the point under the pointer, else the middle, stays where it is */
function enlarge(scale, x, y) {
  const stage = at("stage");
  const place = [x ?? stage.clientWidth / 2, y ?? stage.clientHeight / 2];
  const ratio = Math.min(8, Math.max(1, scale)) / zoom;
  const goal = [(stage.scrollLeft + place[0]) * ratio - place[0], (stage.scrollTop + place[1]) * ratio - place[1]];
  zoom *= ratio;
  if (zoom < 1.01) zoom = 1;
  at("image").style.width = `${zoom * 100}%`;
  [stage.scrollLeft, stage.scrollTop] = goal;
  stage.classList.toggle("zoomed", zoom > 1);
  document.querySelector("[data-do=zoom]").setAttribute("aria-pressed", zoom > 1);
}

let drag = null; // where the mouse went down, and whether it has moved
at("stage").addEventListener("pointerdown", (event) => {
  if (event.button) return;
  drag = { x: event.clientX, y: event.clientY, left: at("stage").scrollLeft, top: at("stage").scrollTop, moved: false };
  if (event.pointerType === "mouse") at("stage").setPointerCapture(event.pointerId);
});
at("stage").addEventListener("pointermove", (event) => {
  if (!drag || event.pointerType !== "mouse") return; // fingers scroll by themselves
  const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
  drag.moved ||= Math.hypot(x, y) > 4;
  if (!drag.moved || zoom === 1) return;
  at("stage").classList.add("moving");
  [at("stage").scrollLeft, at("stage").scrollTop] = [drag.left - x, drag.top - y];
});
at("stage").addEventListener("pointercancel", () => {
  drag = null;
  at("stage").classList.remove("moving");
});
at("stage").addEventListener("click", (event) => {
  const box = at("stage").getBoundingClientRect();
  if (drag && !drag.moved) enlarge(zoom > 1 ? 1 : 2.5, event.clientX - box.left, event.clientY - box.top);
  drag = null;
  at("stage").classList.remove("moving");
});
at("stage").addEventListener(
  "wheel",
  (event) => {
    if (!event.deltaY) return;
    event.preventDefault();
    const box = at("stage").getBoundingClientRect();
    enlarge(zoom * 1.0015 ** -event.deltaY, event.clientX - box.left, event.clientY - box.top);
  },
  { passive: false },
);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches("input")) return;
  if (event.key === "+" || event.key === "-") return enlarge(zoom * (event.key === "+" ? 1.5 : 1 / 1.5));
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  run(action);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) run(button.dataset.do);
});

function run(action) {
  if (action === "zoom") enlarge(zoom > 1 ? 1 : 2.5);
  else if (action === "leave") leave();
  else act(action);
}

function leave() {
  if (busy) return;
  sessionStorage.clear();
  who = state = null;
  tell("");
  at("who").hidden = true;
  begin();
}

function begin() {
  at("ask-name").hidden = Boolean(fixed.rater);
  at("ask-level").hidden = Boolean(fixed.level);
  at("name").value = fixed.rater;
  at("name").required = !fixed.rater;
  for (const radio of document.querySelectorAll("[name=level]")) radio.required = !fixed.level;
  only("start");
  document.querySelector(fixed.rater ? "#form .main" : "#name").focus();
}

async function enter(rater, level) {
  try {
    who = { rater, expert_level: level };
    const first = await post("state", { rater });
    sessionStorage.setItem("who", JSON.stringify(who));
    tell("");
    await show(first);
    if (state.current) at("ask").focus({ preventScroll: true });
  } catch (error) {
    tell(error.message);
    begin();
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const level = fixed.level || new FormData(at("form")).get("level");
  enter(fixed.rater || at("name").value.trim(), Number(level));
});

const known = JSON.parse(sessionStorage.getItem("who") || "null");
const same = known && (!fixed.rater || fixed.rater === known.rater);
if (same) enter(known.rater, Number(fixed.level) || known.expert_level);
else begin();
