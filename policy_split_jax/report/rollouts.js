"use strict";
// Shows one question's answers of both modes. All text goes in as text, never as markup.
(() => {
  const at = (id) => document.getElementById(id);
  const MODES = [["normal", "normal mode"], ["high_entropy", "high-entropy mode"]];
  const WORDS = {
    entropy: "entropy of the mode that wrote it",
    kl: "KL to the other mode",
  };
  const FILTERS = {
    all: () => true,
    disagree: (normal, high) => normal !== high,
    high_entropy: (normal, high) => high && !normal,
    normal: (normal, high) => normal && !high,
  };
  let data = { runs: [] };
  let shade = "entropy";
  let question = 0;

  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const run = () => data.runs[Math.max(0, at("rollout-run").selectedIndex)];
  const step = () => run().steps[Math.max(0, at("rollout-step").selectedIndex)];
  const chosen = () => {
    const holds = FILTERS[at("rollout-filter").value];
    return step().questions.filter(({ sides: [normal, high] }) => holds(normal.right, high.right));
  };

  // Keeps what was chosen where it is still there.
  const fill = (select, labels, otherwise) => {
    const before = select.value;
    select.replaceChildren(...labels.map((label) => new Option(label, label)));
    select.value = before;
    if (select.selectedIndex < 0) select.selectedIndex = otherwise;
  };

  const fillSteps = () => {
    const steps = run().steps;
    const evaluations = steps.map((each, index) => (each.evaluation ? index : -1));
    const last = Math.max(...evaluations);
    fill(at("rollout-step"), steps.map((each) => each.label), last < 0 ? steps.length - 1 : last);
  };

  const mark = (reward) => {
    if (reward === null) return make("span", "mark part", "? not graded");
    const [kind, sign] = reward >= 1 ? ["good", "✓"] : reward > 0 ? ["part", "◐"] : ["bad", "✗"];
    return make("span", "mark " + kind, `${sign} reward ${Number(reward.toPrecision(3))}`);
  };

  const token = (tokens, index) => {
    // A token that only begins a character has no text of its own.
    const text = tokens.text[index];
    const span = make("span", text ? "token" : "token partial", text || "◦");
    const value = tokens[shade]?.[index];
    span.dataset.entropy = tokens.entropy[index] ?? "";
    span.dataset.kl = tokens.kl[index] ?? "";
    span.style.setProperty("--heat", Math.min(1, Math.max(0, (value ?? 0) / (run().scale[shade] || 1))).toFixed(3));
    return span;
  };

  const body = (answer) => {
    const text = make("div", "text");
    text.tabIndex = 0;
    if (!answer.tokens) {
      text.textContent = answer.text;
      return text;
    }
    const spans = answer.tokens.text.map((_, index) => token(answer.tokens, index));
    if (answer.tokens.left_out) {
      const words = `\n[… ${answer.tokens.left_out.toLocaleString("en")} tokens left out …]\n`;
      spans.splice(spans.length / 2, 0, make("span", "muted", words));
    }
    text.append(...spans);
    return text;
  };

  const card = (answer) => {
    const card = make("div", "answer");
    const head = make("div", "head");
    head.append(mark(answer.reward));
    if (answer.entropy !== null) head.append(make("span", "", `entropy ${answer.entropy.toFixed(2)} nats`));
    if (answer.cut_off) head.append(make("span", "", "cut off at the length limit"));
    card.append(head, body(answer));
    return card;
  };

  const column = (side, [mode, name]) => {
    const column = make("div", "side " + mode);
    column.append(make("h3", "", name), ...side.answers.map(card));
    if (!side.answers.length) column.append(make("p", "muted", "no answers"));
    if (side.left_out) column.append(make("p", "muted", `${side.left_out.toLocaleString("en")} more in samples.jsonl`));
    return column;
  };

  const legend = (questions) => {
    const place = at("rollout-legend");
    place.replaceChildren();
    if (!questions.length) return;
    const scored = questions.some(({ sides }) => sides.some(({ answers }) => answers.some(({ tokens }) => tokens)));
    if (!scored) place.append("No figures by token here: evaluations have them.");
    else if (shade === "none") place.append("Point at a token, or tap it, for its figures.");
    else {
      const end = run().scale[shade];
      const unit = end < 1 ? end.toPrecision(2) : end.toFixed(1);
      place.append(`Token shading: ${WORDS[shade]}, 0 `, make("i", "ramp"), ` ${unit} nats and more`);
    }
  };

  const show = () => {
    const questions = chosen();
    question = Math.min(Math.max(question, 0), Math.max(0, questions.length - 1));
    const found = questions[question];
    const none = step().questions.length ? "no such question" : "no question is short enough to be shown";
    at("rollouts").dataset.shade = shade;
    at("rollout-place").textContent = found ? `question ${question + 1} of ${questions.length}` : none;
    at("rollout-previous").disabled = question === 0;
    at("rollout-next").disabled = question >= questions.length - 1;
    at("rollout-question").textContent = found ? found.text : "";
    at("rollout-sides").replaceChildren(...(found ? found.sides.map((side, index) => column(side, MODES[index])) : []));
    legend(step().questions);
    const more = [];
    if (step().left_out) more.push(`${step().left_out.toLocaleString("en")} more questions`);
    if (run().left_out) more.push(`${run().left_out.toLocaleString("en")} more evaluations`);
    at("rollout-left-out").textContent = more.length ? ` samples.jsonl has ${more.join(" and ")}.` : "";
    hide();
  };

  const turn = (by) => {
    question += by;
    show();
  };

  const load = (page) => {
    data = JSON.parse(page.getElementById("rollout-data").textContent);
    at("rollouts").hidden = data.runs.length === 0;
    if (!data.runs.length) return;
    at("rollout-run-label").hidden = data.runs.length === 1;
    fill(at("rollout-run"), data.runs.map(({ name }) => name), data.runs.length - 1);
    fillSteps();
    show();
  };

  // A value by a token that is pointed at or tapped.
  const hide = () => { at("token-value").hidden = true; };
  const tell = (event) => {
    const span = event.target.closest?.(".token");
    if (!span) return hide();
    const figure = (value) => (value === "" ? "—" : Number(value).toFixed(3));
    const box = at("token-value");
    const part = span.classList.contains("partial") ? "part of a character · " : "";
    box.textContent = `${part}entropy ${figure(span.dataset.entropy)} · KL ${figure(span.dataset.kl)} nats`;
    box.hidden = false;
    const [place, size] = [span.getClientRects()[0], box.getBoundingClientRect()];
    const left = Math.min(Math.max(8, place.left), document.documentElement.clientWidth - size.width - 8);
    const above = place.top - size.height - 6;
    box.style.left = `${left}px`;
    box.style.top = `${above > 4 ? above : place.bottom + 6}px`;
  };
  document.addEventListener("pointerover", (event) => { if (event.pointerType !== "touch") tell(event); });
  document.addEventListener("click", tell);
  document.addEventListener("scroll", hide, { capture: true, passive: true });

  at("rollout-run").addEventListener("change", () => { question = 0; fillSteps(); show(); });
  at("rollout-step").addEventListener("change", show);
  at("rollout-filter").addEventListener("change", () => { question = 0; show(); });
  at("rollout-previous").addEventListener("click", () => turn(-1));
  at("rollout-next").addEventListener("click", () => turn(1));
  for (const button of document.querySelectorAll("[data-shade][aria-pressed]")) {
    button.addEventListener("click", () => {
      shade = button.dataset.shade;
      for (const each of document.querySelectorAll("[data-shade][aria-pressed]")) {
        each.setAttribute("aria-pressed", String(each === button));
      }
      show();
    });
  }
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const { top, bottom } = at("rollouts").getBoundingClientRect();
    const elsewhere = event.target.closest?.("select, input, .plot") || bottom < 0 || top > innerHeight;
    if (!by || elsewhere || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const count = data.runs.length ? chosen().length : 0;
    if (question + by >= 0 && question + by < count) turn(by);
  });

  document.addEventListener("renewed", ({ detail }) => load(detail));
  load(document);
})();
