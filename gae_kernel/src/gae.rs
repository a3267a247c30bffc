//! Generalized advantage estimation (Schulman et al., 2016, eq. 16), backwards in time.

use multiversion::multiversion;
use numpy::ndarray::{ArrayView2, ArrayViewMut2, Axis, NdFloat};
use std::sync::Mutex;
use std::thread;

/// T steps of N environments. The elements of a row are neighbours in memory.
pub struct Rollout<'a, T> {
    /// (T, N)
    pub rewards: ArrayView2<'a, T>,
    /// (T + 1, N), the last row is the bootstrap.
    pub values: ArrayView2<'a, T>,
    /// (T, N), any byte but 0 is true.
    pub terminations: ArrayView2<'a, u8>,
    /// (T, N), any byte but 0 is true.
    pub truncations: ArrayView2<'a, u8>,
    pub gamma: T,
    /// gamma * gae_lambda
    pub gamma_lambda: T,
    /// (T, N), written.
    pub advantages: ArrayViewMut2<'a, T>,
    /// (T, N), written.
    pub returns: ArrayViewMut2<'a, T>,
}

/// From this many elements on, threads save more time than they take to start.
const PARALLEL: usize = 1 << 20;

pub fn compute_gae<T: NdFloat>(rollout: Rollout<T>) {
    if rollout.rewards.len() < PARALLEL {
        dispatch(rollout);
    } else {
        let threads = thread::available_parallelism().map_or(1, |threads| threads.get());
        in_threads(rollout, threads);
    }
}

/// No environment depends on another, so the threads share out the columns.
/// They end with the call: there is no pool that a fork would break.
fn in_threads<T: NdFloat>(mut rollout: Rollout<T>, threads: usize) {
    let (gamma, gamma_lambda) = (rollout.gamma, rollout.gamma_lambda);
    let width = rollout.rewards.ncols().div_ceil(threads).next_multiple_of(64);
    let chunks = rollout
        .rewards
        .axis_chunks_iter(Axis(1), width)
        .zip(rollout.values.axis_chunks_iter(Axis(1), width))
        .zip(rollout.terminations.axis_chunks_iter(Axis(1), width))
        .zip(rollout.truncations.axis_chunks_iter(Axis(1), width))
        .zip(rollout.advantages.axis_chunks_iter_mut(Axis(1), width))
        .zip(rollout.returns.axis_chunks_iter_mut(Axis(1), width))
        .map(|(((((rewards, values), terminations), truncations), advantages), returns)| Rollout {
            rewards,
            values,
            terminations,
            truncations,
            gamma,
            gamma_lambda,
            advantages,
            returns,
        });
    let chunks = Mutex::new(chunks);
    let next_chunk = || chunks.lock().unwrap().next();
    let work = || {
        while let Some(chunk) = next_chunk() {
            dispatch(chunk);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Where the system refuses a thread, the others do its work.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

/// Compiled twice: for any processor, and for those with AVX2. The bits are the same, because Rust
/// never fuses a multiplication with an addition.
/// The usual small numbers of environments are constants, so that `advantage` stays in registers.
#[multiversion(targets("x86_64+avx2"))]
fn dispatch<T: NdFloat>(rollout: Rollout<T>) {
    match rollout.rewards.ncols() {
        1 => backwards(rollout, [T::zero(); 1]),
        4 => backwards(rollout, [T::zero(); 4]),
        8 => backwards(rollout, [T::zero(); 8]),
        envs => backwards(rollout, vec![T::zero(); envs]),
    }
}

#[inline(always)]
fn backwards<T: NdFloat>(mut rollout: Rollout<T>, mut advantage: impl AsMut<[T]>) {
    let steps = rollout.rewards.nrows();
    let mut next_values = rollout.values.row(steps).to_slice().unwrap();
    for t in (0..steps).rev() {
        let values = rollout.values.row(t).to_slice().unwrap();
        one_step(
            rollout.rewards.row(t).to_slice().unwrap(),
            values,
            next_values,
            rollout.terminations.row(t).to_slice().unwrap(),
            rollout.truncations.row(t).to_slice().unwrap(),
            rollout.gamma,
            rollout.gamma_lambda,
            advantage.as_mut(),
            rollout.advantages.row_mut(t).into_slice().unwrap(),
            rollout.returns.row_mut(t).into_slice().unwrap(),
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
    // With the lengths known to be equal, the loop checks no index.
    let envs = advantage.len();
    assert!(rewards.len() == envs && values.len() == envs && next_values.len() == envs);
    assert!(terminations.len() == envs && truncations.len() == envs);
    assert!(advantages.len() == envs && returns.len() == envs);
    for n in 0..envs {
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
