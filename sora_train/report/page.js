"use strict";
// Videos lie in the page as base64. One is decoded and attached when it comes near the window, and let go when it
// leaves, so that fifty validations don't play at once. The slider says which validation the `slides` show.
(() => {
  document.documentElement.classList.add("js");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const slider = document.getElementById("step");
  const said = document.getElementById("said");
  const steps = slider ? slider.dataset.steps.split(" ") : [];
  const slides = [...document.querySelectorAll(".player.slides")];
  let at = steps.length - 1;

  function address(number) {
    const store = document.getElementById("m" + number);
    if (store.dataset.href) return store.dataset.href;
    const letters = atob(store.textContent);
    const bytes = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
    return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  }

  function drop(video) {
    if (video.src.startsWith("blob:")) URL.revokeObjectURL(video.src);
    video.removeAttribute("src");
    video.load(); // lets the decoder go
    video.remove();
  }

  function attach(player, number) {
    const video = document.createElement("video");
    video.muted = video.loop = video.playsInline = true;
    video.autoplay = !still;
    video.controls = still;
    video.tabIndex = 0;
    video.onpointerenter = video.onfocus = () => { video.controls = true; };
    video.onpointerleave = video.onblur = () => { video.controls = still; };
    video.onloadedmetadata = () => { player.style.aspectRatio = `${video.videoWidth} / ${video.videoHeight}`; };
    // what was there stays until the new one has a picture
    video.onloadeddata = () => {
      video.classList.add("ready");
      for (const other of player.querySelectorAll("video")) if (other !== video) drop(other);
    };
    video.onerror = () => {
      if (!video.getAttribute("src")) return;
      player.querySelectorAll("video").forEach(drop);
      player.dataset.flaw = "can't be played";
    };
    video.src = address(number);
    player.append(video);
  }

  function show(player) {
    const numbers = player.dataset.media.split(" ");
    const number = numbers[player.classList.contains("slides") ? at : 0];
    const wanted = !player.near ? "" : number;
    if (player.dataset.now === wanted) return;
    player.dataset.now = wanted;
    delete player.dataset.flaw;
    player.querySelectorAll(wanted === "" || wanted === "-" ? "video" : "video:not(.ready)").forEach(drop);
    if (wanted === "-") player.dataset.flaw = "none at this step";
    else if (wanted !== "") attach(player, number);
  }

  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      entry.target.near = entry.isIntersecting;
      show(entry.target);
    }
  }, { rootMargin: "120px 0px" });

  const spoken = (step) => "step " + Number(step).toLocaleString("en");

  function move(to) {
    at = to;
    slider.value = to;
    said.textContent = spoken(steps[at]);
    slider.setAttribute("aria-valuetext", said.textContent);
    for (const player of slides) {
      const step = player.dataset.steps ? player.dataset.steps.split(" ")[at] : "-";
      const label = player.parentElement.querySelector(".at");
      if (label) label.textContent = step === "-" ? "" : spoken(step);
      show(player);
    }
  }

  if (slider) {
    move(at);
    let timer = 0;
    const button = document.getElementById("learn");
    const stop = () => { clearInterval(timer); timer = 0; button.textContent = "▶ watch it learn"; };
    slider.addEventListener("input", () => { stop(); move(Number(slider.value)); });
    button.addEventListener("click", () => {
      if (timer) return stop();
      button.textContent = "❚❚ stop";
      if (at === steps.length - 1) move(0);
      timer = setInterval(() => { if (at < steps.length - 1) move(at + 1); else stop(); }, 1000);
    });
  }

  // every step × every prompt, made when somebody asks for it
  const every = document.getElementById("every");
  every?.addEventListener("toggle", () => {
    const table = every.querySelector("table");
    if (table.rows.length) return;
    const head = table.createTHead().insertRow();
    head.append(document.createElement("th"));
    for (const player of slides) {
      const name = document.createElement("th");
      name.textContent = player.dataset.name;
      head.append(name);
    }
    const body = table.createTBody();
    for (let i = steps.length - 1; i >= 0; i--) {
      const row = body.insertRow();
      const name = document.createElement("th");
      name.textContent = Number(steps[i]).toLocaleString("en");
      row.append(name);
      for (const player of slides) {
        const number = player.dataset.media.split(" ")[i];
        const cell = row.insertCell();
        const own = !player.dataset.steps || player.dataset.steps.split(" ")[i] === steps[i];
        if (number === "-" || !own) continue;
        const copy = document.createElement("div");
        copy.className = "player";
        copy.dataset.media = number;
        copy.style.aspectRatio = player.style.aspectRatio;
        cell.append(copy);
        watch.observe(copy);
      }
    }
  });

  for (const fold of document.querySelectorAll("details.sheets")) fold.open = false;
  document.querySelectorAll(".player").forEach((player) => watch.observe(player));
})();
