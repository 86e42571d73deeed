// What can be chosen at a place of the text: a listbox, whose active option the textarea names while it keeps the focus.

const SIGNS = { "\n": "↵", " ": "·" };

export class Popup {
  constructor(root, area) {
    this.root = root;
    this.area = area;
    this.list = root.querySelector("[role=listbox]");
    this.waiting = root.querySelector("#waiting");
    this.hint = root.querySelector("#hint");
    this.close();
    root.addEventListener("pointerdown", (event) => event.preventDefault()); // the focus stays in the text
    this.list.addEventListener("click", (event) => this.#click(event));
    this.list.addEventListener("pointermove", (event) => this.#enter(event));
  }

  get isOpen() {
    return this.options.length > 0;
  }

  // The active option, or the first.
  get chosen() {
    return this.options[Math.max(this.active, 0)];
  }

  // Offer options, each {text, percent, isNow, take}, under a rectangle of the window; `active` is -1 for none yet.
  // While they grow, those that are there keep their elements: a finger may lie on one.
  open(options, rect, { label, hint = "", active = 0, isWide = true, grows = false }) {
    this.#list(options);
    this.options = options;
    this.list.setAttribute("aria-busy", String(grows));
    this.active = active;
    this.waiting.hidden = true;
    this.list.setAttribute("aria-label", label);
    this.hint.textContent = hint;
    this.#show(rect, isWide);
    this.#activate();
  }

  // Show that something is asked for.
  wait(rect) {
    this.close();
    this.waiting.hidden = false;
    this.#show(rect, true);
  }

  close() {
    this.root.hidden = this.waiting.hidden = true;
    this.options = [];
    this.active = -1;
    this.hint.textContent = "";
    this.list.replaceChildren();
    this.list.removeAttribute("aria-busy");
    this.root.parentElement.style.minHeight = "";
    this.area.removeAttribute("aria-activedescendant");
  }

  // Go up or down, and round.
  move(by) {
    const count = this.options.length;
    this.active = this.active < 0 ? (by > 0 ? 0 : count - 1) : (this.active + by + count) % count;
    this.#activate();
  }

  // What is offered no longer grows.
  settle() {
    this.list.setAttribute("aria-busy", "false");
  }

  #list(options) {
    const isGrown = this.list.ariaBusy === "true";
    if (!isGrown) this.list.replaceChildren();
    options.forEach((option, index) => {
      const item = this.list.children[index];
      if (!item) this.list.append(element(option, index));
      else if (option.text !== this.options[index].text) item.replaceChildren(...element(option, index).childNodes);
    });
    while (this.list.children.length > options.length) this.list.lastElementChild.remove();
  }

  // Below the place, and above the lowest line: the text is given room where it ends before.
  #show(rect, isWide) {
    const sheet = this.root.parentElement;
    const around = sheet.getBoundingClientRect();
    this.root.classList.toggle("wide", isWide);
    this.root.hidden = false;
    const left = Math.min(rect.left - around.left - 12, around.width - this.root.offsetWidth);
    const top = rect.bottom - around.top + 6;
    this.root.style.left = `${Math.max(0, left)}px`;
    this.root.style.top = `${top}px`;
    sheet.style.minHeight = `${top + this.root.offsetHeight}px`;
    this.root.style.scrollMarginBottom = `${document.querySelector("footer").offsetHeight + 4}px`;
    this.root.scrollIntoView({ block: "nearest" });
  }

  #activate() {
    [...this.list.children].forEach((item, index) => item.setAttribute("aria-selected", String(index === this.active)));
    const item = this.list.children[this.active];
    if (!item) return this.area.removeAttribute("aria-activedescendant");
    this.area.setAttribute("aria-activedescendant", item.id);
    item.scrollIntoView({ block: "nearest" });
  }

  #index(event) {
    return [...this.list.children].indexOf(event.target.closest("[role=option]"));
  }

  #click(event) {
    this.options[this.#index(event)]?.take();
  }

  #enter(event) {
    const index = this.#index(event);
    if (index < 0 || index === this.active) return;
    this.active = index;
    this.#activate();
  }
}

function element({ text, percent, isNow }, index) {
  const item = document.createElement("li");
  item.id = `option-${index}`;
  item.setAttribute("role", "option");
  if (isNow) item.setAttribute("aria-current", "true");
  if (percent === undefined) item.append(spelled(text.replace(/^ /u, "")));
  else item.append(spelled(text), share(percent));
  return item;
}

// A text whose line ends, and whose first space, are seen and not heard.
function spelled(text) {
  const span = document.createElement("span");
  span.className = "words";
  span.append(...text.split(/(\n|^ )/u).map((part) => (part in SIGNS ? glyph(SIGNS[part]) : part)));
  return span;
}

export function glyph(sign) {
  const mark = document.createElement("span");
  mark.className = "sign";
  mark.setAttribute("aria-hidden", "true");
  mark.textContent = sign;
  return mark;
}

function share(percent) {
  const span = document.createElement("span");
  span.className = "share";
  span.style.setProperty("--share", `${percent}%`);
  span.textContent = percent < 0.1 ? "< 0.1 %" : `${percent.toFixed(percent < 9.95 ? 1 : 0)} %`;
  return span;
}
