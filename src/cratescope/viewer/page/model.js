"use strict";
// CRATE and GPT-2 in plain JavaScript, as models/modeling_crate.py and transformers' GPT-2 compute them.
// Letters as in the paper: Z tokens (t, d), V projected tokens, A codes (t, h), D the dictionary, an atom a row.
// Numbers are kept in float32 and summed in float64.
(() => {
  /** The float32 numbers of float16 ones, given as 16-bit integers. */
  function fromHalf(halves) {
    const found = new Float32Array(halves.length), table = halfTable();
    for (let i = 0; i < halves.length; i++) found[i] = table[halves[i]];
    return found;
  }

  let table = null;

  /** Every float16 number by its bits. */
  function halfTable() {
    if (table) return table;
    table = new Float32Array(65536);
    for (let bits = 0; bits < 65536; bits++) {
      const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
      if (exponent === 31) table[bits] = fraction ? NaN : sign * Infinity;
      else if (exponent) table[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
      else table[bits] = sign * (fraction / 1024) * 2 ** -14;
    }
    return table;
  }

  /** x (t, n) times W (m, n) transposed -> (t, m); four tokens share each read of a weight. */
  function product(x, W, t, m, n) {
    const y = new Float32Array(t * m);
    let row = 0;
    for (; row + 4 <= t; row += 4) fourTokens(x, W, y, row, m, n);
    for (; row < t; row++) oneToken(x, W, y, row, m, n);
    return y;
  }

  function fourTokens(x, W, y, row, m, n) {
    const a = row * n, b = a + n, c = b + n, d = c + n;
    for (let j = 0, w = 0; j < m; j++, w += n) {
      let p = 0, q = 0, r = 0, s = 0;
      for (let k = 0; k < n; k++) {
        const weight = W[w + k];
        p += weight * x[a + k];
        q += weight * x[b + k];
        r += weight * x[c + k];
        s += weight * x[d + k];
      }
      const to = row * m + j;
      y[to] = p;
      y[to + m] = q;
      y[to + 2 * m] = r;
      y[to + 3 * m] = s;
    }
  }

  /** Four weights at a time instead: sums that do not wait for each other. */
  function oneToken(x, W, y, row, m, n) {
    const from = row * n, to = row * m;
    let j = 0;
    for (; j + 4 <= m; j += 4) {
      const a = j * n, b = a + n, c = b + n, d = c + n;
      let p = 0, q = 0, r = 0, s = 0;
      for (let k = 0; k < n; k++) {
        const value = x[from + k];
        p += value * W[a + k];
        q += value * W[b + k];
        r += value * W[c + k];
        s += value * W[d + k];
      }
      y[to + j] = p;
      y[to + j + 1] = q;
      y[to + j + 2] = r;
      y[to + j + 3] = s;
    }
    for (; j < m; j++) {
      let p = 0;
      for (let k = 0; k < n; k++) p += x[from + k] * W[j * n + k];
      y[to + j] = p;
    }
  }

  /** A (t, h) times D (h, d) -> (t, d), without the zeros of A, which are most of it. */
  function sparseProduct(A, D, t, h, d) {
    const y = new Float32Array(t * d), sum = new Float64Array(d);
    for (let row = 0; row < t; row++) {
      sum.fill(0);
      for (let j = 0; j < h; j++) {
        const code = A[row * h + j];
        if (code === 0) continue;
        for (let k = 0, at = j * d; k < d; k++, at++) sum[k] += code * D[at];
      }
      y.set(sum, row * d);
    }
    return y;
  }

  /** Add a bias (m) to every row of x (t, m), in place. */
  function addBias(x, bias) {
    if (bias) for (let i = 0, k = 0; i < x.length; i++, k = k + 1 === bias.length ? 0 : k + 1) x[i] += bias[k];
    return x;
  }

  function add(x, y) {
    const sum = new Float32Array(x.length);
    for (let i = 0; i < x.length; i++) sum[i] = x[i] + y[i];
    return sum;
  }

  /** LayerNorm of every row of x (t, d). */
  function layerNorm(x, weight, bias, eps) {
    const d = weight.length, y = new Float32Array(x.length);
    for (let from = 0; from < x.length; from += d) {
      let mean = 0, variance = 0;
      for (let k = 0; k < d; k++) mean += x[from + k];
      mean /= d;
      for (let k = 0; k < d; k++) variance += (x[from + k] - mean) ** 2;
      const scale = 1 / Math.sqrt(variance / d + eps);
      for (let k = 0; k < d; k++) y[from + k] = (x[from + k] - mean) * scale * weight[k] + bias[k];
    }
    return y;
  }

  /** Complementary error function, to 1.2e-7 (Press et al., Numerical Recipes, section 6.2). */
  function erfc(x) {
    const t = 1 / (1 + Math.abs(x) / 2);
    const series = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
      1.00002368, -1.26551223];
    const found = t * Math.exp(series.reduce((sum, factor) => sum * t + factor, 0) - x * x);
    return x >= 0 ? found : 2 - found;
  }

  const gelu = (x) => x * 0.5 * erfc(-x / Math.SQRT2);
  const geluNew = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
  const ACTIVATIONS = { relu: (x) => x > 0 ? x : 0, gelu, gelu_new: geluNew, gelu_pytorch_tanh: geluNew };

  /** Causal attention of q (t, d) over keys and values (past + t, d) of all heads, which are at the start of their arrays. */
  function attention(q, keys, values, t, past, d, heads) {
    const width = d / heads, scale = 1 / Math.sqrt(width), y = new Float32Array(t * d);
    const weights = new Float64Array(past + t), sum = new Float64Array(width);
    for (let row = 0; row < t; row++) {
      for (let first = 0; first < d; first += width) {
        scores(q, row * d + first, keys, first, d, width, past + row + 1, scale, weights);
        weighted(weights, values, first, d, width, past + row + 1, sum);
        y.set(sum, row * d + first);
      }
    }
    return y;
  }

  /** The softmax of a token's scores against the first `n` keys, into `weights`. */
  function scores(q, from, keys, first, d, width, n, scale, weights) {
    let largest = -Infinity, total = 0;
    for (let s = 0; s < n; s++) {
      let dot = 0;
      for (let k = 0, at = s * d + first; k < width; k++, at++) dot += q[from + k] * keys[at];
      weights[s] = dot * scale;
      if (weights[s] > largest) largest = weights[s];
    }
    for (let s = 0; s < n; s++) total += weights[s] = Math.exp(weights[s] - largest);
    for (let s = 0; s < n; s++) weights[s] /= total;
  }

  function weighted(weights, values, first, d, width, n, sum) {
    sum.fill(0);
    for (let s = 0; s < n; s++) {
      const weight = weights[s];
      for (let k = 0, at = s * d + first; k < width; k++, at++) sum[k] += weight * values[at];
    }
  }

  /** log softmax of logits, in float64. */
  function logSoftmax(logits) {
    let largest = -Infinity, total = 0;
    for (const logit of logits) if (logit > largest) largest = logit;
    for (const logit of logits) total += Math.exp(logit - largest);
    const shift = largest + Math.log(total);
    return Float64Array.from(logits, (logit) => logit - shift);
  }

  /**
   * about: { family, vocabulary, context, width, heads, layers, neurons, eps, end, tied }, of CRATE with ista: {steps, step_size,
   * penalty, skip, tied }, of GPT-2 with activation. tensor: name -> Float32Array; matrices are kept (outputs, inputs) but for
   * what multiplies neurons, which has a neuron a row.
   *
   * `run` shows `visit(place, layer, x, width)` the activations x (t, width) at "first_codes", "neurons" (CRATE's codes
   * A_t, GPT-2's MLP after its activation function), "attention" and "residual"; it may change them.
   */
  class Model {
    constructor(about, tensor) {
      Object.assign(this, about);
      this.tensor = tensor;
      this.norm = (x, name) => layerNorm(x, tensor[`${name}.weight`], tensor[`${name}.bias`], about.eps);
    }

    /** What is remembered of the tokens read so far; CRATE's keys are its values. */
    fresh() {
      const room = () => new Float32Array(this.context * this.width);
      const layers = Array.from({ length: this.layers }, () => {
        const keys = room();
        return { keys, values: this.family === "crate" ? keys : room() };
      });
      return { length: 0, layers };
    }

    /** Read tokens after those in the cache, which grows; -> the states (t, d) that logits are made of. */
    run(cache, ids, visit = () => {}) {
      if (cache.length + ids.length > this.context) {
        throw new Error(`${cache.length + ids.length} tokens are more than this model's context of ${this.context}`);
      }
      const block = this.family === "crate" ? this.crateBlock : this.gpt2Block;
      let Z = this.embed(ids, cache.length);
      for (let layer = 0; layer < this.layers; layer++) {
        Z = block.call(this, Z, ids.length, layer, cache, visit);
        visit("residual", layer, Z, this.width);
      }
      cache.length += ids.length;
      return this.norm(Z, "ln_f");
    }

    embed(ids, past) {
      const d = this.width, Z = new Float32Array(ids.length * d);
      const { wte, wpe } = this.tensor;
      ids.forEach((id, row) => {
        for (let k = 0; k < d; k++) Z[row * d + k] = wte[id * d + k] + wpe[(past + row) * d + k];
      });
      return Z;
    }

    /** Logits (n, vocabulary) after n of the states, from the row `first` on. */
    logits(states, first, n) {
      const d = this.width, head = this.tensor[this.tied ? "wte" : "head"];
      return product(states.subarray(first * d, (first + n) * d), head, n, this.vocabulary, d);
    }

    /** Z' = Z + MSSA(LN(Z));  Z_next = ISTA(LN(Z')), with Z' added if the block has a skip. */
    crateBlock(Z, t, layer, cache, visit) {
      Z = add(Z, this.mssa(this.norm(Z, `${layer}.ln_1`), t, layer, cache, visit));
      const out = this.coded(this.norm(Z, `${layer}.ln_2`), t, layer, visit);
      return this.ista.skip ? add(Z, out) : out;
    }

    mssa(Z, t, layer, cache, visit) {
      const d = this.width, { keys } = cache.layers[layer], tensor = this.tensor;
      const V = product(Z, tensor[`${layer}.U`], t, d, d);
      keys.set(V, cache.length * d);
      const heads = attention(V, keys, keys, t, cache.length, d, this.heads);
      const out = addBias(product(heads, tensor[`${layer}.W`], t, d, d), tensor[`${layer}.W.bias`]);
      visit("attention", layer, out, d);
      return out;
    }

    /** A_0 = 0;  A_{ k+1 } = relu(A_k + eta D^T (X - D A_k) - eta lam);  -> D A_t. */
    coded(X, t, layer, visit) {
      const d = this.width, h = this.neurons, { steps, step_size: eta, penalty, tied } = this.ista;
      const D = this.tensor[`${layer}.D`];
      let A = null;
      for (let step = 0; step < steps; step++) {
        const residual = X.slice();
        if (A) sparseProduct(A, D, t, h, d).forEach((value, i) => { residual[i] -= value; });
        const ascent = product(residual, D, t, h, d);
        for (let i = 0; i < ascent.length; i++) {
          const code = (A ? A[i] : 0) + eta * ascent[i] - eta * penalty;
          ascent[i] = code > 0 ? code : 0;
        }
        A = ascent;
        if (step === 0) visit("first_codes", layer, A, h);
      }
      visit("neurons", layer, A, h);
      return sparseProduct(A, tied ? D : this.tensor[`${layer}.D_out`], t, h, d);
    }

    /** Z' = Z + attention(LN(Z));  Z_next = Z' + MLP(LN(Z')). */
    gpt2Block(Z, t, layer, cache, visit) {
      Z = add(Z, this.selfAttention(this.norm(Z, `${layer}.ln_1`), t, layer, cache, visit));
      return add(Z, this.mlp(this.norm(Z, `${layer}.ln_2`), t, layer, visit));
    }

    selfAttention(Z, t, layer, cache, visit) {
      const d = this.width, { keys, values } = cache.layers[layer], tensor = this.tensor;
      const [q, k, v] = ["q", "k", "v"].map((name) =>
        addBias(product(Z, tensor[`${layer}.${name}`], t, d, d), tensor[`${layer}.${name}.bias`]));
      keys.set(k, cache.length * d);
      values.set(v, cache.length * d);
      const heads = attention(q, keys, values, t, cache.length, d, this.heads);
      const out = addBias(product(heads, tensor[`${layer}.out`], t, d, d), tensor[`${layer}.out.bias`]);
      visit("attention", layer, out, d);
      return out;
    }

    mlp(X, t, layer, visit) {
      const d = this.width, h = this.neurons, tensor = this.tensor, activation = ACTIVATIONS[this.activation];
      const A = addBias(product(X, tensor[`${layer}.in`], t, h, d), tensor[`${layer}.in.bias`]);
      for (let i = 0; i < A.length; i++) A[i] = activation(A[i]);
      visit("neurons", layer, A, h);
      return addBias(sparseProduct(A, tensor[`${layer}.back`], t, h, d), tensor[`${layer}.back.bias`]);
    }
  }

  /**
   * A sparse autoencoder of activations (models/sae.py). about: { kind, width, d, k, threshold kinds by tensors }; tensors
   * encoder and decoder (m, d), encoder_bias and threshold (m), bias (d).
   */
  class Coder {
    constructor(about, tensor) {
      Object.assign(this, about);
      this.tensor = tensor;
      this.columns = transposed(tensor.encoder, this.width, this.d);
      const away = product(tensor.bias, tensor.encoder, 1, this.width, this.d);
      this.offset = tensor.encoder_bias.map((bias, feature) => bias - away[feature]);
    }

    /** x (t, d) -> codes (t, m). Most of x may be zeros, so E (x - b) + c is computed as E x + (c - E b). */
    encode(x, t) {
      const { threshold } = this.tensor, m = this.width;
      const seen = addBias(sparseProduct(x, this.columns, t, this.d, m), this.offset);
      if (this.kind === "topk") for (let row = 0; row < t; row++) keepLargest(seen.subarray(row * m, (row + 1) * m), this.k);
      else for (let i = 0, j = 0; i < seen.length; i++, j = j + 1 === m ? 0 : j + 1) {
        if (!(seen[i] > 0 && seen[i] > threshold[j])) seen[i] = 0;
      }
      return seen;
    }

    /** Codes (t, m) -> (t, d). */
    decode(z, t) {
      return addBias(sparseProduct(z, this.tensor.decoder, t, this.width, this.d), this.tensor.bias);
    }
  }

  /** (m, n) -> (n, m). */
  function transposed(W, m, n) {
    const found = new Float32Array(W.length);
    for (let j = 0; j < m; j++) for (let k = 0; k < n; k++) found[k * m + j] = W[j * n + k];
    return found;
  }

  /** Zero all but the k largest positive numbers of a row; of equal ones the first stay. */
  function keepLargest(row, k) {
    const least = Float32Array.from(row).sort().at(-k);
    let room = k - row.reduce((n, value) => n + (value > least), 0);
    for (let j = 0; j < row.length; j++) {
      const stays = row[j] > least || (row[j] === least && room-- > 0);
      if (!stays || row[j] < 0) row[j] = 0;
    }
  }

  Cratescope.inside = { ...Cratescope.inside, Model, Coder, fromHalf, logSoftmax };
})();
