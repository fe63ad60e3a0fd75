// How the gradients of attention of one sequence are cut into tasks. The shape alone decides, and with it the order of
// the sums.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/attention_backward.h"

namespace mk {

// Tasks that a batch is cut into where its KV heads are fewer. Where each has as many rows as that, queries times
// heads, packing its keys and joining its sums of dk and dv takes little of its time.
struct GradientCut {
  int64_t tasks, rows;
};
constexpr GradientCut gradient_cuts[] = {{8, 1}, {16, 512}, {32, 2048}, {64, 4096}};
// Work with vectors takes so many times as long, and fewer rows are enough.
constexpr int64_t vector_time = 4;

class GradientParts {
 public:
  // `slow`: by vectors.
  GradientParts(const AttentionGradients& g, const AttentionSequence& s, bool slow)
      : g_(g), s_(s), unit_(slow ? vector_time : 1), tiles_((s.queries + g.rows - 1) / g.rows) {
    for (int64_t i = 0; i < tiles_; i++) all_ += scores(i);
  }

  double scores() const { return all_; }

  // Where the sequence has this share of the batch's scores.
  std::vector<GradientTask> cut(double share) const {
    const int64_t parts = std::clamp<int64_t>(wanted(share), 1, std::max<int64_t>(1, std::min(tiles_, most_parts)));
    // Without a window the later tiles see more keys.
    const bool mirrored = g_.a.causal && !windowed(g_.a) && parts > 1 && 2 * parts <= tiles_ + 1;
    return mirrored ? pairs(parts) : stretches(parts);
  }

  double cost(const GradientTask& task) const {
    double sum = 0;
    for (const GradientTiles& t : task.tiles)
      for (int64_t first = t.first; first < t.last; first += g_.rows) sum += scores(first / g_.rows);
    return sum;
  }

 private:
  int64_t end(int64_t tile) const { return std::min((tile + 1) * g_.rows, s_.queries); }

  double scores(int64_t tile) const {
    const int64_t first = tile * g_.rows, last = end(tile);
    return double(last - first) * (end_visible(g_.a, s_, last - 1) - first_visible(g_.a, s_, first)) + 1;
  }

  int64_t wanted(double share) const {
    const int64_t rows = s_.queries * (g_.a.heads / g_.a.kv_heads) * unit_;
    int64_t parts = 1;
    for (const GradientCut& cut : gradient_cuts) {
      const auto of_tasks = static_cast<int64_t>(std::ceil(cut.tasks * share / g_.a.kv_heads));
      parts = std::max(parts, std::min(of_tasks, rows / cut.rows));
    }
    return parts;
  }

  // Some of the first tiles and as many of the last ones, which together have as many scores as those of other parts.
  std::vector<GradientTask> pairs(int64_t parts) const {
    const int64_t all = (tiles_ + 1) / 2, each = (all + parts - 1) / parts;
    std::vector<GradientTask> tasks;
    for (int64_t first = 0; first < all; first += each) {
      const int64_t last = std::min(first + each, all), behind = std::max(tiles_ - last, last);
      GradientTask task = {};
      task.tiles[0] = {first * g_.rows, end(last - 1)};
      if (behind < tiles_ - first) task.tiles[1] = {behind * g_.rows, end(tiles_ - first - 1)};
      tasks.push_back(task);
    }
    return tasks;
  }

  // Neighbours, which see the same keys, with about as many scores in each part.
  std::vector<GradientTask> stretches(int64_t parts) const {
    std::vector<GradientTask> tasks(1, GradientTask{});
    double before = 0;
    int64_t part = 0;
    for (int64_t i = 0; i < tiles_; i++) {
      const auto here = static_cast<int64_t>((before + scores(i) / 2) * parts / all_);
      if (i && here > part) {
        tasks.push_back({});
        tasks.back().tiles[0].first = i * g_.rows;
      }
      tasks.back().tiles[0].last = end(i);
      part = here;
      before += scores(i);
    }
    return tasks;
  }

  const AttentionGradients& g_;
  const AttentionSequence& s_;
  const int64_t unit_, tiles_;
  double all_ = 0;
};

}  // namespace mk
