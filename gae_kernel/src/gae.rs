//! The recursion of generalized advantage estimation over time-major slices.

use std::ops::{Add, Mul, Sub};

pub trait Float: Copy + Add<Output = Self> + Mul<Output = Self> + Sub<Output = Self> {
    const ZERO: Self;
    fn round(x: f64) -> Self;
    /// `self * (1 - end)`, a product as in the reference: 0 * inf is NaN. Of the two ways to write
    /// it, each type has the one that LLVM makes the faster vector code of.
    fn unless(self, end: bool) -> Self;
}

impl Float for f32 {
    const ZERO: f32 = 0.0;
    #[inline(always)]
    fn round(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn unless(self, end: bool) -> f32 {
        self * f32::from(u8::from(!end))
    }
}

impl Float for f64 {
    const ZERO: f64 = 0.0;
    #[inline(always)]
    fn round(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn unless(self, end: bool) -> f64 {
        if end { self * 0.0 } else { self }
    }
}

/// T steps of `envs` environments, row after row; `values` has one row more than the rest.
/// A flag is a byte, set unless 0: NumPy lets a bool array hold bytes that Rust's `bool` forbids.
#[derive(Clone, Copy)]
pub struct Rollout<'a, T> {
    pub envs: usize,
    pub rewards: &'a [T],
    pub values: &'a [T],
    pub terminations: &'a [u8],
    pub truncations: &'a [u8],
    pub gamma: T,
    /// gamma * gae_lambda, rounded once.
    pub decay: T,
}

impl<T: Float> Rollout<'_, T> {
    #[inline(always)]
    fn delta(&self, reward: T, value: T, next_value: T, terminated: u8) -> T {
        reward + self.gamma.unless(terminated != 0) * next_value - value
    }

    #[inline(always)]
    fn advantage(&self, delta: T, ended: u8, next_advantage: T) -> T {
        delta + self.decay.unless(ended != 0) * next_advantage
    }
}

/// Writes all of `advantages` and `returns`, which have the length of `rewards`.
pub fn compute_gae<T: Float>(rollout: Rollout<T>, advantages: &mut [T], returns: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { with_avx2(rollout, advantages, returns) };
    }
    backwards(rollout, advantages, returns);
}

/// The same code for wider registers: three times as fast. Rust fuses no multiplication with an
/// addition unasked, so every bit stays the same.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<T: Float>(rollout: Rollout<T>, advantages: &mut [T], returns: &mut [T]) {
    backwards(rollout, advantages, returns);
}

#[inline(always)]
fn backwards<T: Float>(rollout: Rollout<T>, advantages: &mut [T], returns: &mut [T]) {
    match rollout.envs {
        1 => few::<T, 1>(rollout, advantages, returns),
        2 => few::<T, 2>(rollout, advantages, returns),
        3 => few::<T, 3>(rollout, advantages, returns),
        4 => few::<T, 4>(rollout, advantages, returns),
        5 => few::<T, 5>(rollout, advantages, returns),
        6 => few::<T, 6>(rollout, advantages, returns),
        7 => few::<T, 7>(rollout, advantages, returns),
        8 => few::<T, 8>(rollout, advantages, returns),
        _ => many(rollout, advantages, returns),
    }
}

/// A row that fits in registers stays there while time runs backwards. What bounds the speed is the
/// chain of one multiplication and one addition a step.
#[inline(always)]
fn few<T: Float, const N: usize>(rollout: Rollout<T>, advantages: &mut [T], returns: &mut [T]) {
    let (rewards, values) = (rollout.rewards.as_chunks().0, rollout.values.as_chunks().0);
    let terminations = rollout.terminations.as_chunks::<N>().0;
    let truncations = rollout.truncations.as_chunks::<N>().0;
    let (advantages, returns) = (advantages.as_chunks_mut().0, returns.as_chunks_mut().0);
    let mut advantage = [T::ZERO; N];
    let mut next_value: [T; N] = values[rewards.len()];
    for t in (0..rewards.len()).rev() {
        let (reward, value): ([T; N], [T; N]) = (rewards[t], values[t]);
        let ends = (terminations[t], truncations[t]);
        let mut target = value;
        for n in 0..N {
            let delta = rollout.delta(reward[n], value[n], next_value[n], ends.0[n]);
            advantage[n] = rollout.advantage(delta, ends.0[n] | ends.1[n], advantage[n]);
            target[n] = advantage[n] + value[n];
        }
        next_value = value;
        (advantages[t], returns[t]) = (advantage, target);
    }
}

/// Row by row, each read once in the order of memory.
#[inline(always)]
fn many<T: Float>(rollout: Rollout<T>, advantages: &mut [T], returns: &mut [T]) {
    let n = rollout.envs;
    let end = vec![T::ZERO; n];
    for start in (0..rollout.rewards.len()).step_by(n).rev() {
        let row = start..start + n;
        let step = Rollout {
            rewards: &rollout.rewards[row.clone()],
            values: &rollout.values[start..start + 2 * n],
            terminations: &rollout.terminations[row.clone()],
            truncations: &rollout.truncations[row.clone()],
            ..rollout
        };
        let (advantages, later) = advantages.split_at_mut(row.end);
        let next_advantages = later.get(..n).unwrap_or(&end);
        one_row(
            step,
            next_advantages,
            &mut advantages[start..],
            &mut returns[row],
        );
    }
}

/// A function of its own, because the compiler knows of arguments that they do not overlap.
#[inline(always)]
fn one_row<T: Float>(
    step: Rollout<T>,
    next_advantages: &[T],
    advantages: &mut [T],
    returns: &mut [T],
) {
    let (values, next_values) = step.values.split_at(step.envs);
    for n in 0..step.envs {
        let ended = step.terminations[n] | step.truncations[n];
        let delta = step.delta(
            step.rewards[n],
            values[n],
            next_values[n],
            step.terminations[n],
        );
        advantages[n] = step.advantage(delta, ended, next_advantages[n]);
        returns[n] = advantages[n] + values[n];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gae(envs: usize, values: &[f64], flags: [&[u8]; 2], gae_lambda: f64) -> [Vec<f64>; 2] {
        let rewards: Vec<f64> = (1..=flags[0].len()).map(|i| i as f64).collect();
        let [terminations, truncations] = flags;
        let rollout = Rollout {
            envs,
            rewards: &rewards,
            values,
            terminations,
            truncations,
            gamma: 0.5,
            decay: 0.5 * gae_lambda,
        };
        let (mut advantages, mut returns) =
            (vec![f64::NAN; rewards.len()], vec![f64::NAN; rewards.len()]);
        compute_gae(rollout, &mut advantages, &mut returns);
        [advantages, returns]
    }

    #[test]
    fn lambda_0_is_the_td_error() {
        let [advantages, returns] = gae(1, &[1.0, 2.0, 4.0], [&[0, 0], &[0, 0]], 0.0);
        assert_eq!(advantages, [1.0, 2.0]);
        assert_eq!(returns, [2.0, 4.0]);
    }

    #[test]
    fn lambda_1_is_the_discounted_return() {
        let [_, returns] = gae(1, &[9.0, 9.0, 9.0, 4.0], [&[0; 3], &[0; 3]], 1.0);
        assert_eq!(
            returns,
            [
                1.0 + 2.0 / 2.0 + 3.0 / 4.0 + 4.0 / 8.0,
                2.0 + 3.0 / 2.0 + 4.0 / 4.0,
                5.0
            ]
        );
    }

    #[test]
    fn a_termination_has_no_successor_and_a_truncation_bootstraps() {
        let ends = |flags| gae(1, &[1.0, 8.0, 0.0], flags, 1.0)[0][0];
        assert_eq!(
            ends([&[0, 0], &[0, 0]]),
            1.0 + 4.0 - 1.0 + (2.0 - 8.0) / 2.0
        );
        assert_eq!(ends([&[0, 0], &[255, 0]]), 1.0 + 4.0 - 1.0);
        assert_eq!(ends([&[2, 0], &[0, 0]]), 1.0 - 1.0);
        assert_eq!(ends([&[1, 0], &[1, 0]]), 1.0 - 1.0);
    }

    #[test]
    fn a_termination_before_an_infinite_value_is_nan() {
        assert!(gae(1, &[1.0, f64::INFINITY], [&[1], &[0]], 1.0)[0][0].is_nan());
    }
}
