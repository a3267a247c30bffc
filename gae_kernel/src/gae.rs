//! Generalized advantage estimation (Schulman et al., 2016, eq. 16), backwards in time.

use multiversion::multiversion;
use numpy::ndarray::{ArrayViewMut3, Axis, NdFloat};
use std::{io, thread};

/// T steps of `envs` environments, row after row.
pub struct Rollout<'a, T> {
    pub envs: usize,
    pub rewards: &'a [T],
    /// A row more than the others, the last is the bootstrap.
    pub values: &'a [T],
    /// Any byte but 0 is true.
    pub terminations: &'a [u8],
    pub truncations: &'a [u8],
    pub gamma: T,
    /// gamma * gae_lambda
    pub gamma_lambda: T,
}

/// From this many elements on, threads save more time than they take to start.
const PARALLEL: usize = 1 << 20;

/// Writes the advantages and the returns, the halves of `outputs`, (2, T, N).
/// No environment depends on another, so threads share out the columns. They end with the call:
/// there is no pool that a fork would break. An error is the system's refusal of a thread.
pub fn run<T: NdFloat>(rollout: &Rollout<T>, mut outputs: ArrayViewMut3<T>) -> io::Result<()> {
    if rollout.rewards.len() < PARALLEL {
        dispatch(rollout, 0, outputs);
        return Ok(());
    }
    let threads = thread::available_parallelism().map_or(1, |threads| threads.get());
    let width = rollout.envs.div_ceil(threads).next_multiple_of(64);
    let chunks = outputs.axis_chunks_iter_mut(Axis(2), width).enumerate();
    thread::scope(|scope| {
        for (i, chunk) in chunks {
            thread::Builder::new()
                .spawn_scoped(scope, move || dispatch(rollout, i * width, chunk))?;
        }
        Ok(())
    })
}

/// Compiled twice: for any processor, and for those with AVX2. The bits are the same, because Rust
/// never fuses a multiplication with an addition.
/// The usual small numbers of environments are constants, so that `advantage` stays in registers.
#[multiversion(targets("x86_64+avx2"))]
fn dispatch<T: NdFloat>(rollout: &Rollout<T>, column: usize, outputs: ArrayViewMut3<T>) {
    match outputs.len_of(Axis(2)) {
        1 => backwards(rollout, column, outputs, [T::zero(); 1]),
        4 => backwards(rollout, column, outputs, [T::zero(); 4]),
        8 => backwards(rollout, column, outputs, [T::zero(); 8]),
        width => backwards(rollout, column, outputs, vec![T::zero(); width]),
    }
}

/// From `column` on, as many columns as `outputs` has.
#[inline(always)]
fn backwards<T: NdFloat>(
    rollout: &Rollout<T>,
    column: usize,
    outputs: ArrayViewMut3<T>,
    mut advantage: impl AsMut<[T]>,
) {
    let steps = outputs.len_of(Axis(1));
    let (advantages, returns) = outputs.split_at(Axis(0), 1);
    let mut advantages = advantages.index_axis_move(Axis(0), 0);
    let mut returns = returns.index_axis_move(Axis(0), 0);
    // Slices of a length that the compiler can follow save the inner loop its bounds checks.
    let width = advantage.as_mut().len();
    let mut next_values = &rollout.values[steps * rollout.envs + column..][..width];
    for t in (0..steps).rev() {
        let row = t * rollout.envs + column..t * rollout.envs + column + width;
        let values = &rollout.values[row.clone()];
        one_step(
            &rollout.rewards[row.clone()],
            values,
            next_values,
            &rollout.terminations[row.clone()],
            &rollout.truncations[row],
            rollout.gamma,
            rollout.gamma_lambda,
            advantage.as_mut(),
            &mut advantages.row_mut(t).into_slice().unwrap()[..width],
            &mut returns.row_mut(t).into_slice().unwrap()[..width],
        );
        next_values = values;
    }
}

/// `advantage` is that of the following step, and becomes that of this one.
#[expect(clippy::too_many_arguments, reason = "only arguments are known not to overlap")]
#[inline(always)]
fn one_step<T: NdFloat>(
    rewards: &[T],
    values: &[T],
    next_values: &[T],
    terminations: &[u8],
    truncations: &[u8],
    gamma: T,
    gamma_lambda: T,
    advantage: &mut [T],
    advantages: &mut [T],
    returns: &mut [T],
) {
    for n in 0..advantage.len() {
        let terminated = terminations[n] != 0;
        let ended = (terminations[n] | truncations[n]) != 0;
        // Multiplied by 0 and not left out, as in the Python reference: 0 * inf is NaN.
        let discount = if terminated { gamma * T::zero() } else { gamma };
        let decay = if ended { gamma_lambda * T::zero() } else { gamma_lambda };
        let delta = rewards[n] + discount * next_values[n] - values[n];
        advantage[n] = delta + decay * advantage[n];
        advantages[n] = advantage[n];
        returns[n] = advantage[n] + values[n];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use numpy::ndarray::Array3;

    /// Advantages and returns of a rollout with special values and ends, by `compute`.
    fn outputs<T: NdFloat>(
        (steps, envs): (usize, usize),
        compute: impl Fn(&Rollout<T>, ArrayViewMut3<T>),
    ) -> Array3<T> {
        let specials = [0.1, -7.7, 1e30, f64::INFINITY, 1e-40, -0.0, 3.0];
        let floats = specials.map(|x| T::from(x).unwrap());
        let values: Vec<T> = floats.into_iter().cycle().take((steps + 1) * envs).collect();
        let terminations: Vec<u8> = (0..steps * envs).map(|i| (i % 5 == 0) as u8 * 255).collect();
        let truncations: Vec<u8> = (0..steps * envs).map(|i| (i % 7 == 0) as u8).collect();
        let rollout = Rollout {
            envs,
            rewards: &values[envs..],
            values: &values,
            terminations: &terminations,
            truncations: &truncations,
            gamma: T::from(0.99).unwrap(),
            gamma_lambda: T::from(0.94).unwrap(),
        };
        let mut outputs = Array3::from_elem((2, steps, envs), T::one());
        compute(&rollout, outputs.view_mut());
        outputs
    }

    fn same_bits<T: NdFloat>(shape: (usize, usize), dispatched: fn(&Rollout<T>, ArrayViewMut3<T>)) {
        let zeros = vec![T::zero(); shape.1];
        let baseline = outputs(shape, |rollout, out| backwards(rollout, 0, out, zeros.clone()));
        let actual = outputs(shape, dispatched);
        let equal =
            |(a, b): (&T, &T)| a.integer_decode() == b.integer_decode() || a.is_nan() && b.is_nan();
        assert!(baseline.iter().zip(&actual).all(equal), "{shape:?}");
    }

    #[test]
    fn instruction_sets_and_threads_change_no_bit() {
        for envs in 1..70 {
            same_bits::<f32>((30, envs), |rollout, outputs| dispatch(rollout, 0, outputs));
            same_bits::<f64>((30, envs), |rollout, outputs| dispatch(rollout, 0, outputs));
        }
        same_bits::<f32>((PARALLEL / 1000, 1029), |rollout, out| run(rollout, out).unwrap());
        same_bits::<f64>((PARALLEL / 1000, 1029), |rollout, out| run(rollout, out).unwrap());
    }
}
