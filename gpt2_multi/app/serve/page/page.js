// The page: an editor in which the model goes on writing. No text of a person or of the model ever becomes markup.

import { Editor } from "./editor.js";
import { Popup, glyph } from "./popup.js";
import { Server } from "./server.js";
import { Settings, forget, isOurs, keep, stored } from "./settings.js";
import { Writing, words } from "./writing.js";

const PAUSE = 1000; // milliseconds without a key, before a suggestion is made
const HOVER = 150; // that the pointer rests on a word, before its alternatives are shown
const LEAVE = 300; // to move from the word to them
const SAVE = 300;
const AGAIN = 1000; // before a server that still loads its model is asked again

const $ = (id) => document.getElementById(id);
const area = $("text");
const editor = new Editor(area, $("mirror"));
const popup = new Popup($("popup"), area);
const server = new Server(stored(sessionStorage, "key", ""));
const settings = new Settings($("settings"));
const writing = new Writing(editor, popup, server, settings);
let passesTab = false; // after Escape, so that nobody is caught in the text

// --- what is said ----------------------------------------------------------------------------------------------------

function say(sentence, isError = false) {
  const notice = $("notice");
  notice.classList.toggle("error", isError);
  notice.replaceChildren(...(isError && sentence ? [glyph("!"), sentence] : [sentence]));
}

function showCounts() {
  const several = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  $("count").textContent = `${several(words(editor.text), "word")} · about ${several(server.tokens(editor.text), "token")}`;
}

function showState() {
  const button = $("suggest");
  const text = writing.isAsking ? "Stop" : "Suggest";
  if (button.firstChild.data.trim() !== text) button.firstChild.data = `${text} `;
  button.lastElementChild.textContent = writing.isAsking ? "Esc" : "Tab";
}

writing.addEventListener("say", ({ detail: { sentence, isError, status } }) => {
  say(sentence, isError);
  if (status === 401) askForKey();
});
writing.addEventListener("state", showState);
writing.addEventListener("answered", ({ detail: seed }) => {
  $("used").hidden = seed === undefined;
  $("used-seed").textContent = String(seed);
  showCounts();
});

// --- keys ------------------------------------------------------------------------------------------------------------

const KEYS = {
  Tab: () => (writing.isOffered ? take() : writing.isAsking || ask()),
  Enter: () => writing.isOffered && popup.active >= 0 && take(),
  ArrowDown: () => writing.isOffered && move(1),
  ArrowUp: () => writing.isOffered && move(-1),
  Escape: leave,
};

function take() {
  popup.chosen.take();
  return true;
}

function ask() {
  writing.ask();
  return true;
}

function move(by) {
  popup.move(by);
  return true;
}

function leave() {
  writing.drop();
  passesTab = true;
  say("Tab now leaves the text.");
  return true;
}

area.addEventListener("keydown", (event) => {
  if (event.isComposing || event.key === "Shift") return;
  const passes = passesTab && event.key === "Tab";
  passesTab = false;
  if (passes || event.shiftKey || event.ctrlKey || event.metaKey) return;
  const does = event.altKey ? event.key === "ArrowDown" && alternatives : KEYS[event.key];
  if (does && does()) event.preventDefault();
});

function alternatives() {
  const mark = editor.markAt(area.selectionStart);
  if (mark) writing.alternatives(mark);
  else say("The model did not write the word at the cursor.");
  return true;
}

// --- text ------------------------------------------------------------------------------------------------------------

let pause;
let saving;

editor.addEventListener("change", () => {
  writing.drop();
  passesTab = false;
  if ($("notice").textContent) say("");
  showCounts();
  clearTimeout(saving);
  saving = setTimeout(save, SAVE);
  clearTimeout(pause);
  if (settings.values.pause && editor.text.trim()) pause = setTimeout(askInPause, PAUSE);
});

function askInPause() {
  const isReading = document.activeElement === area && area.selectionStart === area.selectionEnd;
  if (isReading && !writing.isBusy && !document.hidden && !document.querySelector("dialog[open]")) writing.ask(true);
}

area.addEventListener("compositionstart", () => {
  clearTimeout(pause);
  writing.drop();
});

document.addEventListener("selectionchange", () => writing.isElsewhere && writing.drop());
area.addEventListener("blur", (event) => event.relatedTarget && writing.drop());
for (const kind of ["focus", "pointerdown"]) area.addEventListener(kind, () => (passesTab = false));

function save() {
  clearTimeout(saving);
  saving = undefined;
  if (!keep(localStorage, "text", { text: editor.text, marks: editor.marks })) {
    if (!keep(localStorage, "text", { text: editor.text, marks: [] }))
      say("This browser has no room to keep the text; export it before you leave.", true);
  }
}

addEventListener("pagehide", () => saving !== undefined && save());
addEventListener("storage", ({ key }) => {
  if (isOurs(key) && key.endsWith("text"))
    say("This text is open in another tab too, and the one that writes last is kept.", true);
});

// --- the pointer -----------------------------------------------------------------------------------------------------

let resting;

function later(milliseconds, what) {
  clearTimeout(resting);
  resting = setTimeout(what, milliseconds);
}

area.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch" || event.buttons || (writing.isBusy && !writing.isPointed)) return;
  const mark = editor.markAtPoint(event.clientX, event.clientY);
  if (mark && mark === writing.pointed) clearTimeout(resting);
  else if (mark) later(HOVER, () => writing.alternatives(mark, true));
  else if (writing.isPointed) later(LEAVE, () => writing.isPointed && writing.drop());
  else clearTimeout(resting);
});
area.addEventListener("pointerleave", () => later(LEAVE, () => writing.isPointed && writing.drop()));
$("popup").addEventListener("pointerenter", () => clearTimeout(resting));
$("popup").addEventListener("pointerleave", () => later(LEAVE, () => writing.isPointed && writing.drop()));

area.addEventListener("click", (event) => {
  const mark = event.pointerType === "touch" && editor.markAtPoint(event.clientX, event.clientY);
  if (mark) writing.alternatives(mark);
});
addEventListener("keydown", (event) => event.key === "Escape" && writing.isPointed && writing.drop());

// --- buttons ---------------------------------------------------------------------------------------------------------

function button(id, does) {
  $(id).addEventListener("click", does);
}

for (const id of ["undo", "redo", "suggest"]) $(id).addEventListener("pointerdown", (event) => event.preventDefault());
button("suggest", () => {
  if (writing.isAsking) return writing.drop();
  area.focus({ preventScroll: true });
  writing.ask();
});
for (const command of ["undo", "redo"])
  button(command, () => {
    area.focus({ preventScroll: true });
    document.execCommand(command);
  });
button("tune", () => showSettings($("settings").hidden));
button("ask-help", () => $("help").showModal());
button("clear", () => {
  editor.replace(0, editor.text.length, "");
  say("Cleared. Undo brings it back.");
});
button("export", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([editor.text], { type: "text/plain;charset=utf-8" }));
  link.download = `text-${new Date().toISOString().slice(0, 10)}.txt`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), AGAIN);
  say(`Exported as ${link.download}.`);
});
button("keep", () => (settings.seed = $("used-seed").textContent));
button("forget", () => {
  clearTimeout(saving);
  saving = undefined;
  forget();
  location.reload();
});

function showSettings(isShown) {
  $("settings").hidden = !isShown;
  $("tune").setAttribute("aria-expanded", String(isShown));
  keep(localStorage, "tune", isShown);
}

// --- the server ------------------------------------------------------------------------------------------------------

function askForKey() {
  if (!$("ask-key").open) $("ask-key").showModal();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  $("ask-key").close();
  meet();
});

function useKey(key) {
  server.key = key;
  keep(sessionStorage, "key", key);
}

// A link may bring the key behind "#key=", which no browser sends to any server.
function takeKey() {
  const [, key] = /^#key=(.+)$/u.exec(location.hash) ?? [];
  if (!key) return;
  useKey(decodeURIComponent(key));
  history.replaceState(null, "", location.pathname);
}

async function meet() {
  try {
    const name = await server.model();
    $("model").textContent = name;
    document.title = `Write with ${name}`;
    if (server.limit !== null) settings.limit(server.limit);
    if ($("notice").classList.contains("error")) say("");
  } catch (error) {
    say(error.message, true);
    if (error.status === 401) askForKey();
    if (error.status === 503) setTimeout(meet, AGAIN);
  }
}

function isMark(kept) {
  return Array.isArray(kept?.top);
}

function begin() {
  const { text, marks } = stored(localStorage, "text", {});
  editor.restore(typeof text === "string" ? text : "", Array.isArray(marks) ? marks.filter(isMark) : []);
  area.setSelectionRange(editor.text.length, editor.text.length);
  showSettings(stored(localStorage, "tune", innerWidth >= 1000));
  showCounts();
  takeKey();
  meet();
}

// Keep the lowest line above a keyboard that covers the window.
visualViewport?.addEventListener("resize", () => {
  const hidden = innerHeight - visualViewport.height - visualViewport.offsetTop;
  document.body.style.setProperty("--keyboard", `${Math.max(0, Math.round(visualViewport.scale === 1 ? hidden : 0))}px`);
});

begin();
