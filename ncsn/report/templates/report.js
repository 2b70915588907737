document.querySelectorAll(".animation").forEach(function (figure) {
  var labels = figure.dataset.labels.split("|");
  var slider = figure.querySelector("input"), button = figure.querySelector("button"), output = figure.querySelector("output");
  var timer = 0, touched = false;
  function show(frame) {
    slider.value = frame;
    figure.style.setProperty("--frame", frame);
    output.textContent = labels[frame];
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    button.textContent = "\u25B6";
  }
  function play() {
    button.textContent = "\u23F8";
    var frame = Number(slider.value) + 1 < labels.length ? Number(slider.value) : 0;
    var rest = 0;
    show(frame);
    timer = setInterval(function () {
      if (frame + 1 < labels.length) show(++frame);
      else if (++rest > 10) { frame = rest = 0; show(0); }
    }, 180);
  }
  figure.classList.add("live");
  figure.querySelector(".controls").hidden = false;
  slider.addEventListener("input", function () { touched = true; stop(); show(Number(slider.value)); });
  button.addEventListener("click", function () { touched = true; timer ? stop() : play(); });
  show(labels.length - 1);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches && window.IntersectionObserver) {
    new IntersectionObserver(function (entries, observer) {
      if (entries[0].isIntersecting) { observer.disconnect(); if (!touched) play(); }
    }, { threshold: 0.5 }).observe(figure);
  }
});
