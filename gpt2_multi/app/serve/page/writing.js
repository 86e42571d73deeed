// Writing together: what is asked of the model at the cursor, what it offers, and what is taken of it.

import { endOfRun, marksOf } from "./marks.js";

const END = "<|endoftext|>"; // the token that says so; it is no text

const isTouched = matchMedia("(pointer: coarse)").matches;
const KEYS = isTouched ? "Touch one to take it." : "↑ ↓ choose · Enter takes · Esc drops";

export class Writing extends EventTarget {
  constructor(editor, popup, server, settings) {
    super();
    Object.assign(this, { editor, popup, server, settings });
    this.place = null; // what the open popup belongs to: {start, end, selectionStart}
    this.pointed = null; // the mark whose alternatives are shown
    this.aborter = null;
    this.run = Date.now(); // also after a reload, each suggestion that is taken has a number of its own
  }

  get isAsking() {
    return this.aborter !== null;
  }

  get isBusy() {
    return this.isAsking || this.popup.isOpen;
  }

  // Ask for continuations of what is before the cursor; by a pause, none is active until one is chosen.
  async ask(byPause = false) {
    this.drop();
    if (this.settings.fault) return this.#say(this.settings.fault, true);
    const place = this.editor.place();
    const aborter = new AbortController();
    [this.place, this.aborter] = [place, aborter];
    this.#say("Asking the model …");
    this.popup.wait(this.editor.rect(place.end));
    try {
      const grown = (answer) => this.aborter === aborter && this.#offer(answer, place, byPause);
      const answer = await this.server.complete(place.before, this.settings.values, aborter.signal, grown);
      if (this.aborter !== aborter) return;
      this.aborter = null;
      this.#offer(answer, place, byPause);
    } catch (error) {
      if (this.aborter !== aborter) return; // dropped
      if (this.popup.isOpen) this.#settle(); // what is there can be taken
      else this.drop();
      this.#say(error.message, true, error.status);
    }
  }

  // Forget what is offered, and call off what is asked.
  drop() {
    const wasBusy = this.isBusy;
    this.aborter?.abort();
    this.aborter = this.place = this.pointed = null;
    this.editor.point(null);
    this.popup.close();
    if (wasBusy) this.#say("");
    return wasBusy;
  }

  // Whether the cursor is no longer where the popup belongs.
  get isElsewhere() {
    const { area } = this.editor;
    return this.place !== null && (area.selectionStart !== this.place.selectionStart || area.selectionEnd !== this.place.end);
  }

  // Show what else the model thought of in the place of a mark: at the cursor, or at the pointer.
  alternatives(mark, byPointer = false) {
    if (this.pointed === mark) return;
    this.drop();
    const { editor, popup } = this;
    const { selectionStart, selectionEnd } = editor.area;
    this.place = byPointer ? null : { selectionStart, end: selectionEnd };
    this.pointed = mark;
    const options = mark.top.map(([text, logProb]) => ({
      text: text === END ? "(the text ends)" : text,
      percent: 100 * Math.exp(logProb),
      isNow: text === mark.text,
      take: () => this.#exchange(mark, text),
    }));
    const now = options.findIndex((option) => option.isNow);
    if (!byPointer) this.#say(`${options.length} alternatives. ${KEYS}`);
    popup.open(options, editor.rect(mark.start), {
      label: `Alternatives to ${mark.text.trim() || "a line end"}`,
      active: byPointer ? -1 : Math.max(now, 0),
      isWide: false,
    });
    editor.point(mark);
  }

  // Whether something is offered of which keys choose.
  get isOffered() {
    return this.popup.isOpen && !this.isPointed;
  }

  // Whether what is shown belongs to the pointer, and goes with it.
  get isPointed() {
    return this.pointed !== null && this.place === null;
  }

  #settle() {
    this.aborter = null;
    this.popup.settle();
  }

  // Offer an answer, whole or while it grows.
  #offer({ choices, seed, read }, place, byPause) {
    const grows = this.isAsking;
    const shown = (grows ? choices : distinct(choices)).filter((choice) => choice.text !== "");
    const options = shown.map((choice) => ({ text: choice.text, choice, take: () => this.#take(choice, place) }));
    const isFirst = !this.popup.isOpen;
    if (grows && !options.length) return;
    if (isFirst || !grows) this.dispatchEvent(new CustomEvent("answered", { detail: seed }));
    if (!options.length) {
      this.drop();
      return this.#say("The model would end the text here.");
    }
    const label = options.length === 1 ? "1 suggestion" : `${options.length} suggestions`;
    const part = read < place.before.length ? ` from the last ${words(place.before.slice(-read))} words` : "";
    const active = isFirst ? (byPause ? -1 : 0) : this.#chosen(options);
    if (isFirst || !grows) this.#say(`${grows ? "The model is writing" : `${label}${part}`}. ${KEYS}`);
    this.popup.open(options, this.editor.rect(place.end), { label, hint: KEYS, active, grows });
  }

  // Where among options is what was chosen before they grew; of those that became the same one is left.
  #chosen(options) {
    const before = this.popup.options[this.popup.active]?.choice;
    const place = options.findIndex(({ choice }) => choice === before);
    return place < 0 && before ? options.findIndex(({ text }) => text === before.text) : place;
  }

  #take(choice, place) {
    this.drop();
    this.editor.replace(place.start, place.end, choice.text, marksOf(choice, place.start, this.run++));
  }

  // Put another token in the place of a mark and of what followed from it, and go on from there.
  #exchange(mark, text) {
    const end = endOfRun(this.editor.marks, mark);
    this.drop();
    if (text === mark.text) return;
    if (text === END) return this.editor.replace(mark.start, end, "");
    this.editor.replace(mark.start, end, text, [{ ...mark, end: mark.start + text.length, text }]);
    this.ask();
  }

  #say(sentence, isError = false, status = null) {
    this.dispatchEvent(new CustomEvent("say", { detail: { sentence, isError, status } }));
    this.dispatchEvent(new Event("state"));
  }
}

function distinct(choices) {
  const texts = choices.map((choice) => choice.text);
  return choices.filter((choice, index) => texts.indexOf(choice.text) === index);
}

// How many words a text has.
export function words(text) {
  return text.match(/\S+/gu)?.length ?? 0;
}
