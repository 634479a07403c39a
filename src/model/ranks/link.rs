//! How ranks of one process send each other tensors.
//!
//! Every pair of ranks has a queue of its own, so what one sends another arrives in order. A queue holds [`WAITING`]
//! parcels; a sender waits when it is full. A rank that goes takes its ends of the queues with it: whoever waits for it
//! gets an error instead, so no wait outlasts the life of its peer.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use candle_core::{Device, Tensor};

use crate::model::{Error, Result};

/// Parcels that wait between two ranks: one may be under way while the next is made.
const WAITING: usize = 2;

/// Frees whoever waits on a device for a rank that is gone.
pub type Breaker = Arc<dyn Fn() + Send + Sync>;

/// A rank's connection to the others.
pub trait Link: std::fmt::Debug + Send + Sync {
    /// Which rank this is.
    fn rank(&self) -> usize;

    /// Sends tensors to another rank. Returns when they are on their way.
    ///
    /// # Errors
    /// The other rank is gone.
    fn send(&self, to: usize, parcel: Vec<Tensor>) -> Result<()>;

    /// The next tensors of another rank, on this rank's device.
    ///
    /// # Errors
    /// The other rank is gone.
    fn receive(&self, from: usize) -> Result<Vec<Tensor>>;

    /// Everybody of `team` gives each of them a parcel (itself included) and gets theirs, in the team's order: an
    /// all-to-all. Tensors are contiguous.
    ///
    /// # Errors
    /// One of them is gone.
    fn exchange(&self, team: Range<usize>, parcels: Vec<Vec<Tensor>>) -> Result<Vec<Vec<Tensor>>> {
        let mut own = Vec::new();
        let mine = self.rank();
        for (to, parcel) in team.clone().zip(parcels) {
            if to == mine {
                own = parcel;
            } else {
                self.send(to, parcel)?;
            }
        }
        team.map(|from| if from == mine { Ok(std::mem::take(&mut own)) } else { self.receive(from) }).collect()
    }

    /// What to call when a rank is gone while others may wait for it on their devices.
    fn breaker(&self) -> Option<Breaker> {
        None
    }
}

/// One rank's ends of all queues, by the other rank.
#[derive(Debug)]
pub(crate) struct Ends<T> {
    pub(crate) rank: usize,
    outgoing: Vec<SyncSender<T>>,
    incoming: Vec<Mutex<Receiver<T>>>,
}

/// The queues between `ranks` ranks.
pub(crate) fn mesh<T>(ranks: usize) -> Vec<Ends<T>> {
    let mut ends: Vec<Ends<T>> =
        (0..ranks).map(|rank| Ends { rank, outgoing: Vec::new(), incoming: Vec::new() }).collect();
    for from in 0..ranks {
        for to in 0..ranks {
            let (out, into) = sync_channel(WAITING);
            ends[from].outgoing.push(out);
            ends[to].incoming.push(Mutex::new(into));
        }
    }
    ends
}

impl<T> Ends<T> {
    pub(crate) fn send(&self, to: usize, what: T) -> Result<()> {
        let gone = || Error::Link(format!("rank {to} is gone"));
        self.outgoing.get(to).ok_or_else(gone)?.send(what).map_err(|_| gone())
    }

    pub(crate) fn receive(&self, from: usize) -> Result<T> {
        let gone = || Error::Link(format!("rank {from} is gone"));
        let end = self.incoming.get(from).ok_or_else(gone)?;
        end.lock().unwrap_or_else(|e| e.into_inner()).recv().map_err(|_| gone())
    }
}

/// Tensors change hands in this process: as they are on the processor, through main memory between other devices.
#[derive(Debug)]
struct InProcess {
    ends: Ends<Vec<Tensor>>,
    device: Device,
}

impl Link for InProcess {
    fn rank(&self) -> usize {
        self.ends.rank
    }

    fn send(&self, to: usize, parcel: Vec<Tensor>) -> Result<()> {
        let parcel = parcel.iter().map(|t| t.to_device(&Device::Cpu)).collect::<candle_core::Result<_>>()?;
        self.ends.send(to, parcel)
    }

    fn receive(&self, from: usize) -> Result<Vec<Tensor>> {
        let parcel = self.ends.receive(from)?;
        Ok(parcel.iter().map(|t| t.to_device(&self.device)).collect::<candle_core::Result<_>>()?)
    }
}

/// Links between ranks on these devices, through main memory.
pub fn in_process(devices: &[Device]) -> Vec<Arc<dyn Link>> {
    let ends = mesh(devices.len()).into_iter().zip(devices);
    ends.map(|(ends, device)| Arc::new(InProcess { ends, device: device.clone() }) as Arc<dyn Link>).collect()
}

/// Links between ranks on these devices: NCCL where all are NVIDIA cards and `direct`, else through main memory.
///
/// # Errors
/// NCCL is missing or refuses: what to do about it.
pub fn connect(devices: &[Device], direct: bool) -> Result<Vec<Arc<dyn Link>>> {
    #[cfg(feature = "cuda")]
    if direct && devices.len() > 1 && devices.iter().all(Device::is_cuda) {
        return crate::model::kernels::cuda::nccl::links(devices);
    }
    let _ = direct;
    Ok(in_process(devices))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parcels_arrive_in_order_and_whoever_waits_for_a_rank_that_is_gone_is_told() {
        let mut links = in_process(&vec![Device::Cpu; 3]);
        let (third, second, first) = (links.remove(2), links.remove(1), links.remove(0));
        let number = |n: f32| vec![Tensor::new(&[n], &Device::Cpu).unwrap()];
        let read = |parcel: Vec<Tensor>| parcel[0].to_vec1::<f32>().unwrap()[0];
        first.send(1, number(1.0)).unwrap();
        third.send(1, number(9.0)).unwrap();
        first.send(1, number(2.0)).unwrap();
        assert_eq!([0, 0, 2].map(|from| read(second.receive(from).unwrap())), [1.0, 2.0, 9.0]);
        let waits = std::thread::Builder::new().name("waits".into()).spawn(move || second.receive(0)).unwrap();
        drop(first);
        let why = waits.join().unwrap().unwrap_err().to_string();
        assert!(why.contains("rank 0 is gone"), "{why}");
        assert!(third.send(0, number(3.0)).is_err());
    }
}
