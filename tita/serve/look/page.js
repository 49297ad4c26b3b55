// What a word says when somebody points at it, taps it or moves to it with the keyboard.
(() => {
  const element = (tag, text, look = {}) => Object.assign(document.createElement(tag), {textContent: text, ...look});
  const visible = text => text.trim() ? text.trim() : JSON.stringify(text);

  function row([text, share, isSaid]) {
    const line = element("div", "", {className: "tita-row"});
    const bar = element("i", "");
    line.dataset.isSaid = isSaid;
    bar.style.width = `${100 * share}%`;
    line.append(element("span", visible(text)), bar, element("em", `${(100 * share).toFixed(1)}%`));
    return line;
  }

  function tell(word) {
    const said = JSON.parse(word.dataset.said);
    const about = word.closest(".tita-answer").querySelector(".tita-about");
    const head = element("p", "");
    head.append(element("b", visible(said.text)), ` ${said.nats} nats`);
    if (said.changed) head.append(`; the base takes `, element("b", visible(said.base)));
    about.replaceChildren(head, ...said.top.map(row));
  }

  function go(word, key) {
    const all = [...word.parentElement.querySelectorAll(".tita-word")], at = all.indexOf(word);
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[key];
    if (to === undefined) return false;
    const next = all[Math.max(0, Math.min(all.length - 1, to))];
    word.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    return true;
  }

  const word = event => event.target.closest?.(".tita-word");
  document.addEventListener("pointerover", event => word(event) && tell(word(event)));
  document.addEventListener("focusin", event => word(event) && tell(word(event)));
  document.addEventListener("keydown", event => word(event) && go(word(event), event.key) && event.preventDefault());
})();
