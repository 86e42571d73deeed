// The text: a plain <textarea>, whose undo, selection and input methods are the browser's own, above a mirror of it
// that shows which words are the model's, and where on the page a character stands.

import { changeOf, fitting, moved } from "./marks.js";

const REMEMBERED = 100; // states of the text whose marks come back with it

export class Editor extends EventTarget {
  constructor(area, mirror) {
    super();
    this.area = area;
    this.mirror = mirror;
    this.text = area.value;
    this.marks = [];
    this.states = new Map();
    area.addEventListener("input", () => this.#changed());
  }

  // Begin with a text and its marks, which no undo takes away.
  restore(text, marks) {
    this.area.value = text;
    this.text = this.area.value;
    this.marks = fitting(marks, this.text);
    this.#draw();
  }

  // Where a continuation goes, and what comes before it. Tokens begin with their space, so one at the end is theirs.
  place() {
    const { selectionStart, selectionEnd } = this.area;
    const isSpaced = selectionStart > 1 && this.text[selectionStart - 1] === " ";
    const start = selectionStart - Number(isSpaced);
    return { start, end: selectionEnd, selectionStart, before: this.text.slice(0, start) };
  }

  // Put a text in the place of another, as one step that undo takes back.
  replace(start, end, text, marks = []) {
    const { area } = this;
    area.focus({ preventScroll: true });
    area.setSelectionRange(start, end);
    const command = text === "" ? "delete" : "insertText";
    if (start !== end || text !== "") {
      // Deprecated, and the only way into the browser's own undo.
      if (!document.execCommand(command, false, text)) {
        area.setRangeText(text, start, end, "end");
        this.#changed();
      }
    }
    this.marks = fitting([...this.marks, ...marks].sort((one, other) => one.start - other.start), this.text);
    this.#remember();
    this.#draw();
    this.dispatchEvent(new Event("change"));
  }

  // The mark at a place of the text; at its end, the one before.
  markAt(offset) {
    const before = this.marks.find((mark) => mark.end === offset);
    return this.marks.find((mark) => mark.start <= offset && offset < mark.end) ?? before;
  }

  // The mark at a point of the window, which lies below the textarea.
  markAtPoint(x, y) {
    const span = document.elementsFromPoint(x, y).find((element) => element.parentNode === this.mirror);
    return span && this.marks[Number(span.dataset.mark)];
  }

  // Show which mark is looked at, if any.
  point(mark) {
    this.mirror.querySelector(".pointed")?.classList.remove("pointed");
    if (mark) this.mirror.querySelector(`[data-mark="${this.marks.indexOf(mark)}"]`)?.classList.add("pointed");
  }

  // Where on the page a character stands.
  rect(offset) {
    const walker = document.createTreeWalker(this.mirror, NodeFilter.SHOW_TEXT);
    let [node, left] = [walker.nextNode(), offset];
    while (left >= node.length) {
      left -= node.length;
      node = walker.nextNode();
    }
    const range = document.createRange();
    range.setStart(node, left);
    range.setEnd(node, left + 1);
    return range.getClientRects()[0] ?? this.mirror.getBoundingClientRect();
  }

  #changed() {
    const text = this.area.value;
    const marks = moved(this.marks, changeOf(this.text, text));
    if (marks.length < this.marks.length) this.#remember();
    this.text = text;
    this.marks = this.states.get(text) ?? marks; // undone, or done again
    this.#draw();
    this.dispatchEvent(new Event("change"));
  }

  #remember() {
    this.states.delete(this.text);
    this.states.set(this.text, this.marks);
    if (this.states.size > REMEMBERED) this.states.delete(this.states.keys().next().value);
  }

  #draw() {
    const parts = [];
    let end = 0;
    this.marks.forEach((mark, index) => {
      const span = document.createElement("span");
      span.dataset.mark = index;
      span.textContent = mark.text;
      parts.push(this.text.slice(end, mark.start), span);
      end = mark.end;
    });
    // The last character has no width: it gives an empty last line its height, and the end of the text a place.
    this.mirror.replaceChildren(...parts.filter((part) => part !== ""), `${this.text.slice(end)}\u200b`);
  }
}
