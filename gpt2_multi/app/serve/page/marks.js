// What the model wrote of a text: a mark for each token, {start, end, text, run, top}, in order and never overlapping.
// `run` numbers the suggestion that it came with; `top` is [[text, log-probability], ...], likeliest first.

// What changed from one text to another: `removed` characters from `start` on gave way to `added` ones.
export function changeOf(before, after) {
  const least = Math.min(before.length, after.length);
  let start = 0;
  while (start < least && before[start] === after[start]) start++;
  let same = 0;
  while (same < least - start && before[before.length - 1 - same] === after[after.length - 1 - same]) same++;
  return { start, removed: before.length - start - same, added: after.length - start - same };
}

// The marks of a text after a change: those that it touches are gone.
export function moved(marks, { start, removed, added }) {
  const end = start + removed;
  const shift = added - removed;
  const kept = [];
  for (const mark of marks) {
    if (mark.end <= start) kept.push(mark);
    else if (mark.start >= end) kept.push({ ...mark, start: mark.start + shift, end: mark.end + shift });
  }
  return kept;
}

// The marks of a completion that is put at `start`. Its offsets count characters, and JavaScript's halves of them.
export function marksOf(choice, start, run) {
  const { text_offset: offsets = [], top_logprobs: tops = [], tokens = [] } = choice.logprobs ?? {};
  const units = [0];
  for (const character of choice.text) units.push(units.at(-1) + character.length);
  const unit = (offset) => units[Math.min(Math.max(offset - offsets[0], 0), units.length - 1)];
  return tokens.flatMap((_, index) => {
    const [from, to] = [unit(offsets[index]), index + 1 < tokens.length ? unit(offsets[index + 1]) : choice.text.length];
    if (from >= to) return []; // the first bytes of a character that the next token ends
    return { start: start + from, end: start + to, text: choice.text.slice(from, to), run, top: likeliest(tops[index]) };
  });
}

function likeliest(top) {
  return Object.entries(top ?? {}).filter(isWhole).sort(([, one], [, other]) => other - one);
}

function isWhole([text]) {
  return text !== "" && !text.includes("\ufffd") && !text.startsWith("bytes:"); // bytes that are no whole character
}

// Where ends what a suggestion wrote after a mark, and nobody has changed.
export function endOfRun(marks, mark) {
  let end = mark.end;
  for (const next of marks) if (next.start === end && next.run === mark.run) end = next.end;
  return end;
}

// Those marks that a text really has.
export function fitting(marks, text) {
  let end = 0;
  return marks.filter((mark) => {
    const fits = mark.start >= end && mark.end > mark.start && text.slice(mark.start, mark.end) === mark.text;
    if (fits) end = mark.end;
    return fits;
  });
}
