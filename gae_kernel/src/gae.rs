//! The recursion of generalized advantage estimation over time-major slices.

use std::ops::{Add, Mul, Sub};

pub trait Float:
    Copy + Send + Sync + Add<Output = Self> + Mul<Output = Self> + Sub<Output = Self>
{
    fn round(x: f64) -> Self;
}

impl Float for f32 {
    fn round(x: f64) -> f32 {
        x as f32
    }
}

impl Float for f64 {
    fn round(x: f64) -> f64 {
        x
    }
}

/// One rollout of `envs` environments, row after row. `values` has one row more than the rest.
/// A flag is a byte, set where it is not 0: NumPy lets a bool array hold bytes that Rust's `bool` forbids.
#[derive(Clone, Copy)]
pub struct Rollout<'a, T> {
    pub envs: usize,
    pub rewards: &'a [T],
    pub values: &'a [T],
    pub terminations: &'a [u8],
    pub truncations: &'a [u8],
}

/// The factor of what follows a step: `[it goes on, it ends]`. The latter is a product, because
/// 0 * inf is NaN in the reference too.
type Factor<T> = [T; 2];

/// Writes all of `advantages` and `returns`, which have `rewards`' length.
pub fn compute_gae<T: Float>(
    rollout: Rollout<T>,
    gamma: f64,
    gae_lambda: f64,
    advantages: &mut [T],
    returns: &mut [T],
) {
    let factor = |x: f64| [T::round(x) * T::round(1.0), T::round(x) * T::round(0.0)];
    let (discount, decay) = (factor(gamma), factor(gamma * gae_lambda));
    let mut env = 0;
    macro_rules! blocks {
        ($lanes:literal) => {
            while rollout.envs - env >= $lanes {
                block::<T, $lanes>(rollout, env, discount, decay, advantages, returns);
                env += $lanes;
            }
        };
    }
    blocks!(16);
    blocks!(4);
    blocks!(1);
}

/// The recursion for the environments `env..env + LANES`, which stay in registers while time runs backwards.
fn block<T: Float, const LANES: usize>(
    rollout: Rollout<T>,
    env: usize,
    discount: Factor<T>,
    decay: Factor<T>,
    advantages: &mut [T],
    returns: &mut [T],
) {
    let steps = rollout.rewards.len() / rollout.envs;
    let mut advantage = [T::round(0.0); LANES];
    let mut next_values: [T; LANES] = lanes(rollout.values, steps * rollout.envs + env);
    for start in (0..steps).rev().map(|step| step * rollout.envs + env) {
        let rewards: [T; LANES] = lanes(rollout.rewards, start);
        let values: [T; LANES] = lanes(rollout.values, start);
        let terminated: [u8; LANES] = lanes(rollout.terminations, start);
        let truncated: [u8; LANES] = lanes(rollout.truncations, start);
        let mut targets = values;
        for i in 0..LANES {
            let discount = discount[usize::from(terminated[i] != 0)];
            let decay = decay[usize::from(terminated[i] | truncated[i] != 0)];
            let delta = rewards[i] + discount * next_values[i] - values[i];
            advantage[i] = delta + decay * advantage[i];
            targets[i] = advantage[i] + values[i];
        }
        next_values = values;
        advantages[start..start + LANES].copy_from_slice(&advantage);
        returns[start..start + LANES].copy_from_slice(&targets);
    }
}

fn lanes<T: Copy, const LANES: usize>(slice: &[T], start: usize) -> [T; LANES] {
    *slice[start..]
        .first_chunk()
        .expect("a block lies inside its row")
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
        };
        let (mut advantages, mut returns) =
            (vec![f64::NAN; rewards.len()], vec![f64::NAN; rewards.len()]);
        compute_gae(rollout, 0.5, gae_lambda, &mut advantages, &mut returns);
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
