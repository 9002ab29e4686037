//! The oracle of `linear_w4`.

/// What the groups of a matrix of 4-bit weights take for zero.
#[derive(Clone, Debug)]
pub enum Zeros {
    /// 8 everywhere.
    None,
    /// One code per group, `[out, in / group]`.
    Integer(Vec<u8>),
    /// One number per group, `[out, in / group]`, as f16 holds it.
    Fractional(Vec<half::f16>),
}

/// Weights of 4 bits, laid out as `rksc_kernels.h` says: `w[n, k] = (code - zero) * scale`.
#[derive(Clone, Debug)]
pub struct W4 {
    /// `[out, in / 8]`, k ascending from the low nibble.
    pub codes: Vec<u32>,
    /// `[out, in / group]`.
    pub scales: Vec<half::f16>,
    /// Per group.
    pub zeros: Zeros,
    /// Row width.
    pub in_features: usize,
    /// Rows.
    pub out_features: usize,
    /// k that share a scale and a zero.
    pub group: usize,
}

impl W4 {
    /// `code - zero` of weight (n, k), and its scale.
    fn weight(&self, n: usize, k: usize) -> (f64, f64) {
        let code = self.codes[n * (self.in_features / 8) + k / 8] >> (4 * (k % 8)) & 15;
        let group = n * (self.in_features / self.group) + k / self.group;
        let zero = match &self.zeros {
            Zeros::None => 8.0,
            Zeros::Integer(zeros) => f64::from(zeros[group]),
            Zeros::Fractional(zeros) => zeros[group].to_f64(),
        };
        (f64::from(code) - zero, self.scales[group].to_f64())
    }

    /// y\[t, n\] in f64, and the scale of its rounding errors: sum_k |x| (|code - zero| + 1) scale. The one is for
    /// fractional zeros, whose fraction may be rounded before it is subtracted.
    pub fn linear_oracle(&self, x: &[f32], bias: Option<&[f32]>) -> (Vec<f64>, Vec<f64>) {
        let (mut y, mut size) = (Vec::new(), Vec::new());
        for x in x.chunks(self.in_features) {
            for n in 0..self.out_features {
                let bias = bias.map_or(0.0, |bias| f64::from(bias[n]));
                let (mut sum, mut sizes) = (bias, bias.abs());
                for (k, &x) in x.iter().enumerate() {
                    let (code, scale) = self.weight(n, k);
                    sum += f64::from(x) * code * scale;
                    sizes += f64::from(x).abs() * (code.abs() + 1.0) * scale.abs();
                }
                y.push(sum);
                size.push(sizes);
            }
        }
        (y, size)
    }
}
