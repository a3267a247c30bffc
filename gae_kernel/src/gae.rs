//! Generalized advantage estimation (Schulman et al., 2016, eq. 16), backwards in time.

use multiversion::multiversion;
use numpy::ndarray::{ArrayView2, ArrayViewMut2, Axis};
use std::ops::{Add, Mul, Range, Sub};
use std::sync::Mutex;
use std::thread;

/// f32 or f64. `From<bool>` gives 0 and 1.
pub trait Float:
    Copy + Send + Sync + From<bool> + Add<Output = Self> + Mul<Output = Self> + Sub<Output = Self>
{
}

impl Float for f32 {}
impl Float for f64 {}

/// T steps of N environments. The elements of a row are neighbours in memory.
#[derive(Clone, Copy)]
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
}

/// From this many elements on, threads save more time than they take to start.
const PARALLEL: usize = 1 << 20;

/// Writes every element of `advantages` and `returns`, both (T, N).
pub fn compute_gae<T: Float>(
    rollout: Rollout<T>,
    advantages: ArrayViewMut2<T>,
    returns: ArrayViewMut2<T>,
) {
    if rollout.rewards.len() < PARALLEL {
        dispatch(rollout, advantages, returns);
    } else {
        let threads = thread::available_parallelism().map_or(1, |threads| threads.get());
        in_threads(rollout, advantages, returns, threads);
    }
}

/// No environment depends on another, so the threads share out the columns.
/// They end with the call: there is no pool that a fork would break.
fn in_threads<T: Float>(
    rollout: Rollout<T>,
    mut advantages: ArrayViewMut2<T>,
    mut returns: ArrayViewMut2<T>,
    threads: usize,
) {
    let envs = rollout.rewards.ncols();
    let width = envs.div_ceil(threads).next_multiple_of(64);
    let starts = (0..envs).step_by(width);
    let chunks = starts
        .zip(advantages.axis_chunks_iter_mut(Axis(1), width))
        .zip(returns.axis_chunks_iter_mut(Axis(1), width));
    let chunks = Mutex::new(chunks);
    let next_chunk = || chunks.lock().unwrap().next();
    let work = || {
        while let Some(((start, advantages), returns)) = next_chunk() {
            let columns = start..envs.min(start + width);
            dispatch(rollout.columns(columns), advantages, returns);
        }
    };
    thread::scope(|scope| {
        for _ in 1..envs.div_ceil(width) {
            // Where the system refuses a thread, the others do its work.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

impl<T: Copy> Rollout<'_, T> {
    fn columns(self, range: Range<usize>) -> Self {
        Rollout {
            rewards: columns(self.rewards, range.clone()),
            values: columns(self.values, range.clone()),
            terminations: columns(self.terminations, range.clone()),
            truncations: columns(self.truncations, range),
            ..self
        }
    }
}

fn columns<T>(mut array: ArrayView2<'_, T>, range: Range<usize>) -> ArrayView2<'_, T> {
    array.slice_axis_inplace(Axis(1), range.into());
    array
}

/// `backwards`, compiled twice: for any processor, and for those with AVX2. The bits are the same,
/// because Rust never fuses a multiplication with an addition.
#[multiversion(targets("x86_64+avx2"))]
fn dispatch<T: Float>(
    rollout: Rollout<T>,
    advantages: ArrayViewMut2<T>,
    returns: ArrayViewMut2<T>,
) {
    backwards(rollout, advantages, returns);
}

#[inline(always)]
fn backwards<T: Float>(
    rollout: Rollout<T>,
    mut advantages: ArrayViewMut2<T>,
    mut returns: ArrayViewMut2<T>,
) {
    let (steps, envs) = rollout.rewards.dim();
    let mut advantage = vec![T::from(false); envs];
    for t in (0..steps).rev() {
        one_step(
            row(rollout.rewards, t),
            row(rollout.values, t),
            row(rollout.values, t + 1),
            row(rollout.terminations, t),
            row(rollout.truncations, t),
            rollout.gamma,
            rollout.gamma_lambda,
            &mut advantage,
            advantages.row_mut(t).into_slice().unwrap(),
            returns.row_mut(t).into_slice().unwrap(),
        );
    }
}

#[inline(always)]
fn row<T>(array: ArrayView2<'_, T>, t: usize) -> &[T] {
    array.index_axis_move(Axis(0), t).to_slice().unwrap()
}

/// `advantage` is that of the following step, and becomes that of this one.
#[expect(clippy::too_many_arguments, reason = "only arguments are known not to overlap")]
#[inline(always)]
fn one_step<T: Float>(
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
    let zero = T::from(false);
    for n in 0..envs {
        let terminated = terminations[n] != 0;
        let ended = (terminations[n] | truncations[n]) != 0;
        // Multiplied by 0 and not left out, as in the Python reference: 0 * inf is NaN.
        let discount = if terminated { gamma * zero } else { gamma };
        let decay = if ended { gamma_lambda * zero } else { gamma_lambda };
        let delta = rewards[n] + discount * next_values[n] - values[n];
        advantage[n] = delta + decay * advantage[n];
        advantages[n] = advantage[n];
        returns[n] = advantage[n] + values[n];
    }
}
