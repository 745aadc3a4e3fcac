"use strict";

const at = (id) => document.getElementById(id);
const fixed = document.body.dataset;
const mode = fixed.mode, pair = mode === "pair";
const CRITERIA = { disc: "How clear is the optic disc?", vessels: "How clear are the vessels?", contrast: "How good is the contrast?", artifacts: "How free is it from artifacts?" };
const [QUESTIONS, NAMES] = { // questions asked one after another, by the field of the answer; names of the ratings
  rate: [{ rating: "Does it look like a good photograph?", ...(fixed.criteria && CRITERIA), alignment: "Does it show what the text says?" }, { 1: "1, poor.", 2: "2, acceptable.", 3: "3, excellent." }],
  real: [{ rating: "Is this a photograph, or generated?" }, { 1: "Generated.", 3: "Photograph." }],
  pair: [{ rating: "Which image is better?" }, { 1: "The second.", 2: "No difference.", 3: "The first." }],
}[mode];
const SAID = { ...NAMES, none: "Ungradable.", skip: "Skipped.", undo: "Undone." };
const keysOf = (button) => button.getAttribute("aria-keyshortcuts").split(" ").map((key) => [key, button.dataset.do]);
const KEYS = Object.fromEntries([...document.querySelectorAll("[aria-keyshortcuts]")].flatMap(keysOf)); // of this mode
const FIELDS = Object.keys(QUESTIONS);
const pictures = [...document.querySelectorAll("#stage img")]; // one, or two of a pair
const images = new Map(); // id -> promise of a blob URL, for the current and the next image
let who = null; // {rater, expert_level}
let state = null;
let busy = false; // a request is in progress
let seen = false; // the image is displayed
let answers = []; // to the questions about this image, in the order of FIELDS
let zoom = 1;
let green = false;

history.replaceState(null, "", "/"); // no token in the address bar

/* Fetch a response, or throw an error with a message for the user and the status. */
async function ask(address, options) {
  const answer = await fetch(address, options).catch(() => {
    throw new Error("The server does not answer, and your last click may be lost. If the server is still running, try again.");
  });
  if (answer.ok) return answer;
  const { detail } = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(detail || `The server refused this (${answer.status}).`), { status: answer.status });
}

async function post(name, body) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(`/api/${name}`, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

const download = async (id) => URL.createObjectURL(await (await ask(`/image/${id}`)).blob());

function load(id) {
  if (!images.has(id)) {
    images.set(id, download(id));
    images.get(id).catch(() => images.delete(id)); // so that the next call tries again
  }
  return images.get(id);
}

const tell = (text) => (at("alert").textContent = text);
const idsOf = (one) => (one ? one.images || [one.id] : []);
const only = (section) => ["start", "ask", "examples", "done"].forEach((id) => (at(id).hidden = id !== section));

async function show(next) {
  const before = state?.current?.id;
  state = next;
  put([]);
  at("who").hidden = false;
  at("name-shown").textContent = `Rating as ${who.rater}.`;
  at("leave").hidden = Boolean(fixed.rater && fixed.level);
  at("progress-text").textContent = `${state.rated} of ${state.total} rated`;
  Object.assign(at("progress"), { max: state.total, value: state.rated });
  for (const button of document.querySelectorAll("[data-do=undo]")) button.setAttribute("aria-disabled", !state.undo);
  for (const [id, address] of images) {
    if ([...idsOf(state.current), ...idsOf(state.next)].includes(id)) continue;
    images.delete(id);
    address.then(URL.revokeObjectURL, () => {});
  }
  if (!state.current) return finish();
  only("ask");
  at("prompt").textContent = state.current.prompt;
  if (state.current.id === before && seen) return;
  await picture(state.current);
  for (const id of idsOf(state.next)) load(id).catch(() => {});
}

async function picture(one) {
  seen = false;
  for (const image of pictures) image.classList.add("loading");
  enlarge(1);
  for (const name of ["brightness", "contrast"]) at(name).value = 100;
  look(false);
  try {
    const addresses = await Promise.all(idsOf(one).map(load));
    if (state.current?.id !== one.id) return;
    await Promise.all(pictures.map((image, place) => ((image.src = addresses[place]), image.decode())));
    for (const image of pictures) image.classList.remove("loading");
    seen = true;
  } catch (error) {
    tell(error.message);
  }
}

function finish() {
  const skipped = state.skipped, things = pair ? "pairs" : "images";
  at("thanks").textContent = skipped ? "Nearly done" : "Done, thank you";
  at("summary").textContent = skipped
    ? `You rated ${state.rated} of ${state.total} ${things} and skipped ${skipped}. All ratings are saved.`
    : `You rated all ${state.total} ${things}. Everything is saved; you can close this page.`;
  at("results").replaceChildren(...state.summary.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
  at("again").hidden = !skipped;
  only("done");
  at("thanks").focus();
}

async function act(action) {
  if (action === "zoom") return toggle();
  if (action === "green") return look(!green);
  if (action === "examples") return examples();
  if (busy || !state) return;
  if (action === "leave") {
    sessionStorage.clear();
    return location.reload();
  }
  const none = action === "none";
  const rating = none ? 1 : Number(action);
  if (action === "undo" && answers.length) return put(answers.slice(0, -1));
  if (action === "undo" && !state.undo) return;
  if ((rating || action === "skip") && (!state.current || at("ask").hidden)) return;
  if (rating && !seen) return; // the image is not displayed yet
  const given = none ? FIELDS.map(() => 1) : [...answers, rating];
  if (rating && given.length < FIELDS.length) return put(given);
  busy = true;
  tell("");
  try {
    const about = { ...who, undoable: state.undo }; // so that a retry does not undo another click
    if (state.current) about.id = state.current.id;
    if (rating) FIELDS.forEach((field, place) => (about[field] = given[place]));
    const next = await post(rating ? "rate" : action, about);
    at("status").textContent = (!next.already && SAID[action]) || "";
    await show(next);
    if (next.already && action === "undo") tell("You have clicked in another window, or this was already undone; nothing else was undone.");
    else if (next.already) tell("You had already rated that image, perhaps in another window; that rating was kept.");
  } catch (error) {
    tell(error.message);
    if (error.status === 404) await show(await post("state", { rater: who.rater })).catch(() => {});
  } finally {
    busy = false;
  }
}

/* Ask the question that follows these answers; the text is only shown for the last one, alignment. */
function put(given) {
  answers = given;
  const field = FIELDS[given.length];
  at("text").hidden = !pair && field !== "alignment";
  at("question").textContent = QUESTIONS[field] + (FIELDS.length > 1 ? ` (${given.length + 1} of ${FIELDS.length})` : "");
  document.querySelector("#others [data-do=undo]").setAttribute("aria-disabled", !(given.length || state.undo));
}

/* Toggle between the image and the reference images. */
async function examples() {
  if (!state?.current) return;
  only(at("examples").hidden ? "examples" : "ask");
  at(at("examples").hidden ? "ask" : "examples").focus({ preventScroll: true });
  if (at("examples").hidden || at("examples").querySelector("figure")) return;
  for (const part of fixed.examples.split(" ")) {
    const [rating, id] = part.split(":"), figure = document.createElement("figure"), image = new Image();
    image.alt = `Example of ${SAID[rating]}`;
    figure.append(image, Object.assign(document.createElement("figcaption"), { textContent: SAID[rating] }));
    at("examples").append(figure);
    download(id).then((address) => (image.src = address), (error) => tell(error.message));
  }
}

/* Show the image with or without red, with the sliders' brightness and contrast. */
function look(redFree) {
  green = redFree;
  const levels = ["brightness", "contrast"].map((name) => `${name}(${at(name).value}%)`).join(" ");
  for (const image of pictures) image.style.filter = `${green ? "url(#green) " : ""}${levels}`;
  document.querySelector("[data-do=green]").setAttribute("aria-pressed", green);
}
at("look").addEventListener("input", () => look(green));

/* Zoom around the pointer; moving it pans the image. */
function enlarge(scale) {
  zoom = Math.min(8, Math.max(1, scale));
  for (const image of pictures) image.style.transform = `scale(${zoom})`;
  document.querySelector("[data-do=zoom]").setAttribute("aria-pressed", zoom > 1);
}
const toggle = () => enlarge(zoom > 1 ? 1 : 2.5);

at("stage").addEventListener("pointermove", (event) => {
  const box = (event.target.closest(".frame") || at("stage")).getBoundingClientRect();
  const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  for (const image of pictures) image.style.transformOrigin = place.map((part) => `${100 * part}%`).join(" ");
});
at("stage").addEventListener("click", toggle);
at("stage").addEventListener("wheel", (event) => {
  event.preventDefault();
  enlarge(zoom * 1.0015 ** -event.deltaY);
}, { passive: false });

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches("input:not([type=range])")) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  act(action);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button && event.detail) button.blur(); // else a stray Enter or Space would rate the next image
  if (button) act(button.dataset.do);
});

function begin() {
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

const known = JSON.parse(sessionStorage.getItem("who"));
if (known && [known.rater, ""].includes(fixed.rater)) enter(known.rater, Number(fixed.level) || known.expert_level);
else begin();
