//! The recursion of generalized advantage estimation over time-major slices.

use std::num::NonZero;
use std::ops::{Add, Mul, Range, Sub};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex};
use std::{env, slice, thread};

pub trait Float:
    'static + Copy + Send + Sync + Add<Output = Self> + Mul<Output = Self> + Sub<Output = Self>
{
    const ZERO: Self;
    /// The narrowest rows for which AVX2 pays; those of `f32` that `few` takes are slower with it.
    const AVX2_FROM: usize;
    fn round(x: f64) -> Self;
    /// `self * (1 - end)`, a product as in the reference: 0 * inf is NaN. Of the two ways to write
    /// it, each type has the one that LLVM makes the faster vector code of.
    fn unless(self, end: bool) -> Self;
}

impl Float for f32 {
    const ZERO: f32 = 0.0;
    const AVX2_FROM: usize = 9;
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
    const AVX2_FROM: usize = 5;
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

/// The advantages and the returns, which threads share: each writes columns of its own.
struct Outputs<T>(*mut T, *mut T);

// SAFETY: `row` says who may use the pointers for what.
unsafe impl<T: Float> Sync for Outputs<T> {}

impl<T: Float> Outputs<T> {
    /// # Safety
    /// The elements exist, and nothing else uses them while the slices live.
    #[inline(always)]
    unsafe fn row<'a>(&self, start: usize, width: usize) -> [&'a mut [T]; 2] {
        unsafe { [self.0, self.1].map(|x| slice::from_raw_parts_mut(x.add(start), width)) }
    }
}

/// From this many elements on, threads gain more than their start costs.
const PARALLEL: usize = 1 << 20;

/// As many threads as this process may run at once, unless the variable for Rust's says fewer.
static THREADS: LazyLock<usize> = LazyLock::new(|| {
    let limit = env::var("RAYON_NUM_THREADS").ok().and_then(|limit| limit.parse().ok());
    let limit = limit.filter(|&limit| limit > 0).unwrap_or(usize::MAX);
    thread::available_parallelism().map_or(1, NonZero::get).min(limit)
});

/// Writes all of `advantages` and `returns`.
pub fn compute_gae<T: Float>(rollout: Rollout<T>, advantages: &mut [T], returns: &mut [T]) {
    static ONE_CALL_AT_A_TIME: Mutex<()> = Mutex::new(());
    assert_eq!([advantages.len(), returns.len()], [rollout.rewards.len(); 2]);
    let outputs = Outputs(advantages.as_mut_ptr(), returns.as_mut_ptr());
    if rollout.rewards.len() >= PARALLEL
        && *THREADS > 1
        && let Ok(_turn) = ONE_CALL_AT_A_TIME.try_lock()
    {
        in_parallel(rollout, &outputs);
    } else {
        dispatch(rollout, 0..rollout.envs, &outputs);
    }
}

/// The threads of a call end with it: there is no pool that a fork would break.
fn in_parallel<T: Float>(rollout: Rollout<T>, outputs: &Outputs<T>) {
    let n = rollout.envs;
    let width = n.div_ceil(*THREADS).next_multiple_of(64);
    let next_column = AtomicUsize::new(0);
    let work = || {
        loop {
            let column = next_column.fetch_add(width, Ordering::Relaxed);
            if column >= n {
                break;
            }
            dispatch(rollout, column..n.min(column + width), outputs);
        }
    };
    thread::scope(|scope| {
        for _ in 1..n.div_ceil(width) {
            // Where the system refuses a thread, the others do its work.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}

fn dispatch<T: Float>(rollout: Rollout<T>, columns: Range<usize>, outputs: &Outputs<T>) {
    #[cfg(target_arch = "x86_64")]
    if rollout.envs >= T::AVX2_FROM && is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { with_avx2(rollout, columns, outputs) };
    }
    backwards(rollout, columns, outputs);
}

/// The same code in wider registers. Rust fuses no multiplication with an addition unasked, so the
/// bits stay the same.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<T: Float>(rollout: Rollout<T>, columns: Range<usize>, outputs: &Outputs<T>) {
    backwards(rollout, columns, outputs);
}

#[inline(always)]
fn backwards<T: Float>(rollout: Rollout<T>, columns: Range<usize>, outputs: &Outputs<T>) {
    match rollout.envs {
        1 => few::<T, 1>(rollout, outputs),
        2 => few::<T, 2>(rollout, outputs),
        3 => few::<T, 3>(rollout, outputs),
        4 => few::<T, 4>(rollout, outputs),
        5 => few::<T, 5>(rollout, outputs),
        6 => few::<T, 6>(rollout, outputs),
        7 => few::<T, 7>(rollout, outputs),
        8 => few::<T, 8>(rollout, outputs),
        // Whole rows, said so that the compiler knows: a fourth faster at 64 environments.
        n if columns.len() == n => many(rollout, 0..n, outputs),
        _ => many(rollout, columns, outputs),
    }
}

/// A row that fits in registers stays there while time runs backwards. What bounds the speed is the
/// chain of one multiplication and one addition a step.
#[inline(always)]
fn few<T: Float, const N: usize>(rollout: Rollout<T>, outputs: &Outputs<T>) {
    let (rewards, values) = (rollout.rewards.as_chunks().0, rollout.values.as_chunks().0);
    let terminations = rollout.terminations.as_chunks::<N>().0;
    let truncations = rollout.truncations.as_chunks::<N>().0;
    let mut advantage = [T::ZERO; N];
    let mut next_value: [T; N] = values[rewards.len()];
    for t in (0..rewards.len()).rev() {
        let (reward, value): ([T; N], [T; N]) = (rewards[t], values[t]);
        let (terminated, truncated) = (terminations[t], truncations[t]);
        let mut target = value;
        for n in 0..N {
            let delta = rollout.delta(reward[n], value[n], next_value[n], terminated[n]);
            advantage[n] = rollout.advantage(delta, terminated[n] | truncated[n], advantage[n]);
            target[n] = advantage[n] + value[n];
        }
        next_value = value;
        // SAFETY: a row of `rewards` is one of the outputs, and so few columns have one thread.
        let [advantages, returns] = unsafe { outputs.row(t * N, N) };
        advantages.copy_from_slice(&advantage);
        returns.copy_from_slice(&target);
    }
}

/// Row by row, each read once and in the order of memory.
#[inline(always)]
fn many<T: Float>(rollout: Rollout<T>, columns: Range<usize>, outputs: &Outputs<T>) {
    let (n, width) = (rollout.envs, columns.len());
    let end = vec![T::ZERO; width];
    let mut next_advantages = end.as_slice();
    for row_start in (0..rollout.rewards.len()).step_by(n).rev() {
        let start = row_start + columns.start;
        let row = start..start + width;
        let step = Rollout {
            rewards: &rollout.rewards[row.clone()],
            values: &rollout.values[start..row.end + n],
            terminations: &rollout.terminations[row.clone()],
            truncations: &rollout.truncations[row],
            ..rollout
        };
        // SAFETY: a row of `rewards` is one of the outputs, and `columns` are this thread's.
        let [advantages, returns] = unsafe { outputs.row(start, width) };
        one_row(step, next_advantages, advantages, returns);
        next_advantages = advantages;
    }
}

/// A function of its own, because only of arguments does the compiler know that they never overlap.
#[inline(always)]
fn one_row<T: Float>(step: Rollout<T>, next: &[T], advantages: &mut [T], returns: &mut [T]) {
    let (values, next_values) = (step.values, &step.values[step.envs..]);
    for n in 0..step.rewards.len() {
        let terminated = step.terminations[n];
        let delta = step.delta(step.rewards[n], values[n], next_values[n], terminated);
        advantages[n] = step.advantage(delta, terminated | step.truncations[n], next[n]);
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
            [1.0 + 2.0 / 2.0 + 3.0 / 4.0 + 4.0 / 8.0, 2.0 + 3.0 / 2.0 + 4.0 / 4.0, 5.0]
        );
    }

    #[test]
    fn a_termination_has_no_successor_and_a_truncation_bootstraps() {
        let ends = |flags| gae(1, &[1.0, 8.0, 0.0], flags, 1.0)[0][0];
        assert_eq!(ends([&[0, 0], &[0, 0]]), 1.0 + 4.0 - 1.0 + (2.0 - 8.0) / 2.0);
        assert_eq!(ends([&[0, 0], &[255, 0]]), 1.0 + 4.0 - 1.0);
        assert_eq!(ends([&[2, 0], &[0, 0]]), 1.0 - 1.0);
        assert_eq!(ends([&[1, 0], &[1, 0]]), 1.0 - 1.0);
    }

    #[test]
    fn a_termination_before_an_infinite_value_is_nan() {
        assert!(gae(1, &[1.0, f64::INFINITY], [&[1], &[0]], 1.0)[0][0].is_nan());
    }

    #[test]
    fn wide_registers_and_threads_change_no_bit() {
        let (steps, specials) = (30, [0.1, -7.7, 1e30, f32::MAX, f32::INFINITY, 1e-40, -0.0]);
        for envs in [1, 3, 8, 9, 40, 333] {
            let numbers = |stride: usize, count| -> Vec<f32> {
                (0..count).map(|i| specials[i * stride / 5 % 7] * (i % 11) as f32).collect()
            };
            let flags = |every| -> Vec<u8> {
                (0..steps * envs).map(|i| u8::from(i % every == 0)).collect()
            };
            let rollout = Rollout {
                envs,
                rewards: &numbers(3, steps * envs),
                values: &numbers(8, (steps + 1) * envs),
                terminations: &flags(13),
                truncations: &flags(17),
                gamma: 0.99,
                decay: 0.9,
            };
            let bits = |run: &dyn Fn(&Outputs<f32>)| -> Vec<u32> {
                let (mut a, mut r) = (vec![0.0; steps * envs], vec![0.0; steps * envs]);
                run(&Outputs(a.as_mut_ptr(), r.as_mut_ptr()));
                let canonical = |x: &f32| if x.is_nan() { f32::NAN } else { *x }.to_bits();
                a.iter().chain(&r).map(canonical).collect()
            };
            let baseline = bits(&|outputs| backwards(rollout, 0..envs, outputs));
            assert_eq!(baseline, bits(&|outputs| dispatch(rollout, 0..envs, outputs)));
            assert_eq!(baseline, bits(&|outputs| in_parallel(rollout, outputs)));
        }
    }

    /// Nanoseconds of the fastest of many calls.
    fn fastest(calls: u32, mut call: impl FnMut()) -> f64 {
        let time = |_| {
            let start = std::time::Instant::now();
            call();
            start.elapsed().as_secs_f64() * 1e9
        };
        (0..calls).map(time).fold(f64::INFINITY, f64::min)
    }

    #[test]
    #[ignore = "a measurement: run it with --release --ignored --nocapture"]
    fn what_bounds_one_environment() {
        let [delta, decay] = std::hint::black_box([1.0_f32, 0.5]);
        let chain = fastest(100, || {
            let advantage = (0..1_000_000).fold(0.0, |advantage, _| delta + decay * advantage);
            std::hint::black_box(advantage);
        });
        println!(
            "a multiplication and an addition that wait for each other: {:.3} ns",
            chain / 1e6
        );
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    #[ignore = "a measurement: run it with --release --ignored --nocapture"]
    fn what_avx2_gains() {
        fn compare<T: Float>(name: &str, steps: usize, envs: usize) {
            let (floats, flags) = (vec![T::round(1.0); (steps + 1) * envs], vec![0; steps * envs]);
            let (rewards, decay) = (&floats[envs..], T::round(0.9));
            let (terminations, truncations) = (&flags[..], &flags[..]);
            let rollout = Rollout {
                envs,
                rewards,
                values: &floats,
                terminations,
                truncations,
                gamma: decay,
                decay,
            };
            let mut outputs = [rewards.to_vec(), rewards.to_vec()];
            let outputs = {
                let [advantages, returns] = &mut outputs;
                Outputs(advantages.as_mut_ptr(), returns.as_mut_ptr())
            };
            let baseline = fastest(2000, || backwards(rollout, 0..envs, &outputs));
            // SAFETY: this is run where there is AVX2.
            let wide = fastest(2000, || unsafe { with_avx2(rollout, 0..envs, &outputs) });
            let gain = baseline / wide;
            println!("({steps}, {envs}) {name}: baseline {baseline:.0} ns, AVX2 {gain:.2}x faster");
        }
        for (steps, envs) in [(128, 8), (2048, 8), (2048, 64), (128, 1024)] {
            compare::<f32>("float32", steps, envs);
            compare::<f64>("float64", steps, envs);
        }
    }
}
